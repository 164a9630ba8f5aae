"""How much arithmetic a forward pass needs, from shapes alone: for MFU, also where no counter can
run.

A multiply-add counts as 2 FLOPs; norms, activations and softmax are left out, as MFU figures
usually do. A training step costs three times the forward pass.

Symbols: D width, N image tokens, S condition tokens, L = P + T prefix and caption tokens of one
LLM.
"""

from __future__ import annotations

from collections.abc import Mapping

from lidit.models.conditioner import StateProjection
from lidit.models.layers import FREQUENCIES
from lidit.models.lidit import LIDiT


def forward_flops(
    model: LIDiT,
    latent_size: tuple[int, int],
    caption_tokens: Mapping[str, float],
    prefix_tokens: Mapping[str, int],
) -> dict[str, float]:
    """FLOPs of one sample's forward pass, {"conditioner": ..., "transformer": ...}.

    `latent_size` (height, width); tokens per encoder name, padding included. The prefix's
    projection is left out: it runs once per batch.
    """
    config = model.config
    width, patch = config.width, config.patch_size
    square = 2.0 * width**2  # one D x D matrix on one token
    image_tokens = (latent_size[0] // patch) * (latent_size[1] // patch)
    condition_tokens = sum(
        min(tokens, config.visible_tokens or tokens) for tokens in caption_tokens.values()
    )
    vector = 2.0 * FREQUENCIES * width + square  # timestep embedder

    block = (
        image_tokens * (4 + 2 + 8) * square  # qkv + output; query + output; feed-forward
        + condition_tokens * 2 * square  # key and value of the text
        # scores and weighted sums of both attentions
        + 4.0 * image_tokens * (image_tokens + condition_tokens) * width
        + 9 * square  # modulation
    )
    ends = 2.0 * image_tokens * 2 * config.channels * patch**2 * width  # patch embedding and output
    position = image_tokens * 18 * square  # two 3 x 3 convolutions
    transformer = config.depth * block + ends + position + vector + (2 + 2) * square

    lengths = {name: caption_tokens[name] + prefix_tokens[name] for name in config.encoders}
    fused = model.conditioner.fusion is not None
    conditioner = 0.0
    for name in config.encoders:
        length, others = lengths[name], sum(lengths.values()) - lengths[name]
        conditioner += caption_tokens[name] * _projection(
            model.conditioner.branch(name).projection, width
        )
        if model.conditioner.branch(name).condition is not None:
            conditioner += vector + square
        gates = 2 if config.refiner_gated else 0
        conditioner += config.refiner_depth * (
            12 * length * square + 4.0 * length**2 * width + gates * square
        )
        if fused:
            attention = (2 * length + 2 * others) * square + 4.0 * length * others * width
            conditioner += config.fusion_depth * (attention + 8 * length * square + 6 * square)
    return {"conditioner": conditioner, "transformer": transformer}


def _projection(projection: StateProjection, width: int) -> float:
    """FLOPs of one token's projection, with the averages over its layers; a mean is no product."""
    mixture, layer_width = projection.mixture, projection.linear.in_features
    if mixture is None or mixture.averages == 1:
        averaging = (
            2.0 * projection.layers * layer_width if mixture and mixture.scores is not None else 0.0
        )
        return averaging + 2.0 * layer_width * width
    return 2.0 * projection.layers * (layer_width + mixture.averages) * width
