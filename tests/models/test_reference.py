"""The paper's equations written plainly, one sample at a time and without padding, against the
batched modules.

Every function takes the weights by name and a [tokens, width] matrix; nothing of `lidit.models` is
used in them.
"""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

TOLERANCE = 1e-10
Weights = dict[str, torch.Tensor]


def part(weights: Weights, prefix: str) -> Weights:
    return {
        name[len(prefix) + 1 :]: value
        for name, value in weights.items()
        if name.startswith(prefix + ".")
    }


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standardise(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def layer_norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return standardise(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)


def attention(
    w: Weights,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(RMSNorm(q) RMSNorm(k)^T / sqrt(E)) v, head by head."""
    size = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        query = rms_norm(w["query_norm.weight"], q[:, columns])
        key = rms_norm(w["key_norm.weight"], k[:, columns])
        scores = query @ key.T / math.sqrt(size)
        if allowed is not None:
            scores = torch.where(allowed, scores, -torch.inf)
        weights = torch.exp(scores - scores.max(1, keepdim=True).values)
        outputs.append(weights / weights.sum(1, keepdim=True) @ v[:, columns])
    return linear(w, "output", torch.cat(outputs, dim=1))


def self_attention(
    w: Weights, x: torch.Tensor, heads: int, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    q, k, v = linear(w, "qkv", x).chunk(3, dim=1)
    return attention(w, q, k, v, heads, allowed)


def cross_attention(w: Weights, x: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    k, v = linear(w, "key_value", context).chunk(2, dim=1)
    return attention(w, linear(w, "query", x), k, v, heads)


def feed_forward(w: Weights, x: torch.Tensor) -> torch.Tensor:
    return linear(w, "contract", gelu(linear(w, "expand", x)))


def embed_timestep(w: Weights, t: torch.Tensor) -> torch.Tensor:
    sinusoids = get_timestep_embedding(
        t[None], 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000
    )
    return linear(w, "contract", silu(linear(w, "expand", sinusoids[0].to(w["expand.weight"]))))


def modulation(w: Weights, condition: torch.Tensor, count: int) -> list[torch.Tensor]:
    return list(linear(w, "linear", silu(condition)).chunk(count))


def refiner(
    w: Weights, x: torch.Tensor, condition: torch.Tensor, heads: int, kind: str
) -> torch.Tensor:
    """N blocks: x + g1 SelfAttention(LN(x)); x + g2 FFN(LN(x)); g = gates(SiLU(condition)) or 1."""
    length = len(x)
    allowed = {
        "full": torch.ones(length, length, dtype=torch.bool),
        "ungated": torch.ones(length, length, dtype=torch.bool),
        "causal": torch.ones(length, length).tril() > 0,
        "own": torch.eye(length) > 0,
    }[kind]
    for index in range(1 + max(int(name.split(".")[1]) for name in w)):
        block = part(w, f"blocks.{index}")
        g1, g2 = (1, 1) if kind == "ungated" else modulation(part(block, "gates"), condition, 2)
        normal = layer_norm(block, "attention_norm", x)
        x = x + g1 * self_attention(part(block, "attention"), normal, heads, allowed)
        x = x + g2 * feed_forward(
            part(block, "feed_forward"), layer_norm(block, "feed_forward_norm", x)
        )
    return x


def fuse(
    w: Weights, xs: list[torch.Tensor], conditions: list[torch.Tensor], heads: int
) -> list[torch.Tensor]:
    """Each branch: cross-attention to LN of all the others, then FFN; shift, scale and output scale
    for both.

    Block k of branch i is number k x branches + i.
    """
    for first in range(0, 1 + max(int(name.split(".")[1]) for name in w), len(xs)):
        outputs = []
        for i, x in enumerate(xs):
            block = part(w, f"blocks.{first + i}")
            b1, s1, g1, b2, s2, g2 = modulation(part(block, "modulation"), conditions[i], 6)
            others = torch.cat([standardise(other) for j, other in enumerate(xs) if j != i])
            x = x + g1 * cross_attention(
                part(block, "attention"), standardise(x) * (1 + s1) + b1, others, heads
            )
            outputs.append(
                x + g2 * feed_forward(part(block, "feed_forward"), standardise(x) * (1 + s2) + b2)
            )
        xs = outputs
    return xs


def condition_of(w: Weights, caption: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return embed_timestep(part(w, "timestep_embedder"), t) + linear(w, "text", caption.mean(0))


def conditioner(
    w: Weights, text: dict, sample: int, t: torch.Tensor, heads: int, kind: str, fusion: bool
) -> tuple:
    """One sample's tokens [S, D] and their mean [D]."""
    xs, conditions, prefixes = [], [], []
    for index, name in enumerate(sorted(text)):
        branch, entry = part(w, f"branches.{index}"), text[name]
        raw = torch.cat([entry.prefix, entry.states[sample][entry.mask[sample]]])
        normal = ((raw - branch["projection.mean"]) / branch["projection.deviation"]).clamp(-10, 10)
        x = linear(branch, "projection.linear", normal)
        caption = x[len(entry.prefix) :]
        adaptive = any(name.startswith("condition.") for name in branch)
        conditions.append(condition_of(part(branch, "condition"), caption, t) if adaptive else None)
        xs.append(
            refiner(part(branch, "refiner"), x, conditions[-1], heads, kind)
            if kind != "none"
            else x
        )
        prefixes.append(len(entry.prefix))
    if fusion:
        xs = fuse(part(w, "fusion"), xs, conditions, heads)
    tokens = torch.cat([x[prefix:] for x, prefix in zip(xs, prefixes, strict=True)])
    return tokens, tokens.mean(0)


def position_block(w: Weights, image: torch.Tensor) -> torch.Tensor:
    """image + conv(SiLU(GN(conv(SiLU(GN(image)))))), zero padding, 3 x 3. [D, h, w]"""

    def group_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        groups = x.reshape(32, -1)
        centred = groups - groups.mean(1, keepdim=True)
        normal = (centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5)).reshape(x.shape)
        return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def convolve(name: str, x: torch.Tensor) -> torch.Tensor:
        _, height, width = x.shape
        padded = torch.zeros(len(x), height + 2, width + 2, dtype=x.dtype)
        padded[:, 1:-1, 1:-1] = x
        result = w[f"{name}.bias"][:, None, None].expand(-1, height, width).clone()
        for row in range(3):
            for column in range(3):
                window = padded[:, row : row + height, column : column + width]
                result += torch.einsum(
                    "oc,chw->ohw", w[f"{name}.weight"][:, :, row, column], window
                )
        return result

    residual = convolve("convolution1", silu(group_norm("norm1", image)))
    return image + convolve("convolution2", silu(group_norm("norm2", residual)))


def block(
    w: Weights, x: torch.Tensor, context: torch.Tensor, condition: torch.Tensor, heads: int
) -> torch.Tensor:
    """x + g SA(LN(x)(1+s)+b); x + g CA(LN(x)(1+s)+b, text); x + g FFN(LN(x)(1+s)+b)."""
    b1, s1, g1, b2, s2, g2, b3, s3, g3 = modulation(part(w, "modulation"), condition, 9)
    x = x + g1 * self_attention(part(w, "self_attention"), standardise(x) * (1 + s1) + b1, heads)
    x = x + g2 * cross_attention(
        part(w, "cross_attention"), standardise(x) * (1 + s2) + b2, context, heads
    )
    return x + g3 * feed_forward(part(w, "feed_forward"), standardise(x) * (1 + s3) + b3)


def transformer(
    w: Weights,
    latents: torch.Tensor,
    t: torch.Tensor,
    contexts: list,
    pooled: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Latents [C, H, W], patch size 2; a context for each of the two blocks."""
    channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    patches = torch.stack(
        [
            latents[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
            for i in range(rows)
            for j in range(columns)
        ]
    )
    x = linear(w, "patch_embedder", patches)  # [N, D]
    image = x.T.reshape(-1, rows, columns)
    x = position_block(part(w, "position"), image).reshape(x.shape[1], -1).T
    text = linear(w, "pooled_embedder.2", silu(linear(w, "pooled_embedder.0", pooled)))
    condition = embed_timestep(part(w, "timestep_embedder"), t) + text
    for index in range(2):
        x = block(part(w, f"blocks.{index}"), x, contexts[index], condition, heads)
    shift, scale = modulation(part(w, "final_modulation"), condition, 2)
    patches = linear(w, "final_linear", standardise(x) * (1 + scale) + shift)
    result = torch.empty_like(latents)
    for number, patch in enumerate(patches):
        i, j = divmod(number, columns)
        result[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch.reshape(channels, 2, 2)
    return result


REFINERS = {
    "full": {},
    "causal": {"causal": True},
    "ungated": {"gated": False},
    "own": {"mixing": False},
    "none": {"depth": 0},
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("fusion", ["refiner", "concatenation"])
@pytest.mark.parametrize("kind", list(REFINERS))
def test_conditioner_is_the_papers(make_model, make_text, kind, fusion, count):
    model = make_model(count, dtype=torch.float64, refiner=REFINERS[kind], fusion={"mode": fusion})
    text = make_text(count=count, dtype=torch.float64)
    timestep = torch.tensor([0.1, 0.5, 0.9])
    condition = model.conditioner(text, timestep)
    weights = model.conditioner.state_dict()
    for sample in range(3):
        fused = fusion == "refiner" and count > 1
        tokens, pooled = conditioner(weights, text, sample, timestep[sample], 4, kind, fused)
        torch.testing.assert_close(
            condition.tokens[sample][condition.mask[sample]], tokens, rtol=TOLERANCE, atol=TOLERANCE
        )
        torch.testing.assert_close(condition.pooled[sample], pooled, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_refiner_depths_of_table_5(make_model, make_text, depth):
    model = make_model(1, dtype=torch.float64, refiner={"depth": depth}, fusion={"mode": "none"})
    text, timestep = make_text(count=1, dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4])
    condition = model.conditioner(text, timestep)
    tokens, _ = conditioner(model.conditioner.state_dict(), text, 2, timestep[2], 4, "full", False)
    torch.testing.assert_close(
        condition.tokens[2][condition.mask[2]], tokens, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_a_collaborative_refiner_of_two_blocks(make_model, make_text):
    model = make_model(3, dtype=torch.float64, fusion={"depth": 2})
    text, timestep = make_text(count=3, dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4])
    condition = model.conditioner(text, timestep)
    tokens, _ = conditioner(model.conditioner.state_dict(), text, 1, timestep[1], 4, "full", True)
    torch.testing.assert_close(
        condition.tokens[1][condition.mask[1]], tokens, rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (10, 6)])
def test_whole_model_is_the_papers(make_model, make_text, size):
    model, text = make_model(dtype=torch.float64), make_text(dtype=torch.float64)
    latents, timestep = (
        torch.randn(3, 3, *size, dtype=torch.float64),
        torch.tensor([0.05, 0.6, 1.0]),
    )
    prediction = model(latents, timestep, text)
    weights = model.state_dict()
    for sample in range(3):
        tokens, pooled = conditioner(
            part(weights, "conditioner"), text, sample, timestep[sample], 4, "full", True
        )
        expected = transformer(
            part(weights, "transformer"),
            latents[sample],
            timestep[sample],
            [tokens, tokens],
            pooled,
            heads=4,
        )
        torch.testing.assert_close(prediction[sample], expected, rtol=TOLERANCE, atol=TOLERANCE)


# -- several layers of an LLM ----------------------------------------------------------------------

STORED = {"first": 4, "second": 3}  # of 20 and 12 channels: layers of 5 and 4


def averages(branch: Weights, raw: torch.Tensor, layers: int) -> list[torch.Tensor]:
    """Each layer standardised over its width; sum_l softmax(scores)_l layer_l for every row of
    scores, projected.
    """
    normal = ((raw - branch["projection.mean"]) / branch["projection.deviation"]).clamp(-10, 10)
    size = raw.shape[1] // layers
    parts = [standardise(normal[:, size * i : size * (i + 1)]) for i in range(layers)]
    scores = branch.get("projection.mixture.scores", torch.zeros(1, layers, dtype=torch.float64))
    weights = [torch.exp(row) / torch.exp(row).sum() for row in scores]
    return [
        linear(branch, "projection.linear", sum(w * x for w, x in zip(row, parts, strict=True)))
        for row in weights
    ]


def layered_conditioner(
    w: Weights, text: dict, sample: int, t: torch.Tensor, stored: dict
) -> list[torch.Tensor]:
    """What each block reads, [S, D], the refiners' own average first: x_block + (refined(x_own) -
    x_own).
    """
    xs, conditions, prefixes, all_averages = [], [], [], []
    for index, name in enumerate(sorted(text)):
        branch, entry = part(w, f"branches.{index}"), text[name]
        raw = torch.cat([entry.prefix, entry.states[sample][entry.mask[sample]]])
        if stored.get(name, 1) > 1:
            found = averages(branch, raw, stored[name])
        else:
            normal = ((raw - branch["projection.mean"]) / branch["projection.deviation"]).clamp(
                -10, 10
            )
            found = [linear(branch, "projection.linear", normal)]
        conditions.append(condition_of(part(branch, "condition"), found[0][len(entry.prefix) :], t))
        xs.append(refiner(part(branch, "refiner"), found[0], conditions[-1], 4, "full"))
        prefixes.append(len(entry.prefix))
        all_averages.append(found)
    if len(xs) > 1:
        xs = fuse(part(w, "fusion"), xs, conditions, 4)
    number = max(len(found) for found in all_averages)
    blocks = []
    for k in range(number):
        own = [
            (x + (found[k] if len(found) > 1 else found[0]) - found[0])[prefix:]
            for x, found, prefix in zip(xs, all_averages, prefixes, strict=True)
        ]
        blocks.append(torch.cat(own))
    return blocks


@pytest.mark.parametrize("count", [1, 2, 3])  # the third has one layer
@pytest.mark.parametrize("layers", ["mean", "learned", "per_block"])
def test_several_layers_of_an_llm(make_model, make_text, layers, count):
    stored = {name: STORED[name] for name in list(STORED)[:count]}
    model = make_model(count, dtype=torch.float64, stored_layers=stored, layers=layers)
    text, timestep = make_text(count=count, dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4])
    condition = model.conditioner(text, timestep)
    assert (condition.of_blocks is None) == (layers != "per_block")
    for sample in range(3):
        mask = condition.mask[sample]
        shared, *own = layered_conditioner(
            model.conditioner.state_dict(), text, sample, timestep[sample], stored
        )
        torch.testing.assert_close(
            condition.tokens[sample][mask], shared, rtol=TOLERANCE, atol=TOLERANCE
        )
        torch.testing.assert_close(
            condition.pooled[sample], shared.mean(0), rtol=TOLERANCE, atol=TOLERANCE
        )
        assert len(own) == (2 if layers == "per_block" else 0)
        for number, tokens in enumerate(own):
            found = condition.of_block(number)[sample][mask]
            torch.testing.assert_close(found, tokens, rtol=TOLERANCE, atol=TOLERANCE)


def test_each_block_of_the_whole_model_reads_its_own_layers(make_model, make_text):
    model = make_model(1, dtype=torch.float64, stored_layers={"first": 4}, layers="per_block")
    text, latents = (
        make_text(count=1, dtype=torch.float64),
        torch.randn(3, 3, 8, 4, dtype=torch.float64),
    )
    timestep, weights = torch.tensor([0.05, 0.6, 1.0]), model.state_dict()
    prediction = model(latents, timestep, text)
    for sample in range(3):
        shared, *own = layered_conditioner(
            part(weights, "conditioner"), text, sample, timestep[sample], {"first": 4}
        )
        expected = transformer(
            part(weights, "transformer"),
            latents[sample],
            timestep[sample],
            own,
            shared.mean(0),
            heads=4,
        )
        torch.testing.assert_close(prediction[sample], expected, rtol=TOLERANCE, atol=TOLERANCE)
