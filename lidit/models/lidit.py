"""LI-DiT: conditioner and transformer as one trainable model (paper 3.1 and 3.2).

    instruction + caption -> frozen LLM, one or several       lidit/text/encoder.py
      -> states, standardised and projected, per LLM          conditioner.py, StateProjection
                                                              (layers: mixture.py)
      -> linguistic token refiner, per LLM                    refiner.py
      -> collaborative refiner, over all LLMs                 fusion.py
      -> instruction cut off, captions joined: the condition  conditioner.py, PromptConditioner
    noisy latents -> patches, position by convolution         transformer.py, PositionBlock
      -> depth x [self-attention, cross-attention to the      transformer.py, LIDiTBlock
         condition, feed-forward] -> prediction

The timestep and the pooled text drive every gate, shift and scale (layers.py, Modulation). What
enters and leaves the conditioner is in states.py, the sizes are in presets.py.

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lidit.config import ModelSettings
from lidit.config.json_object import read_object
from lidit.errors import InputError, one_line
from lidit.models.conditioner import PromptConditioner
from lidit.models.layers import PlainAttention, initialise
from lidit.models.mixture import Layers
from lidit.models.presets import resolve_shape
from lidit.models.states import TextStates
from lidit.models.transformer import LIDiTTransformer

WEIGHTS_NAME = "diffusion_pytorch_model"
SHARD = re.compile(r"-\d{5}-of-\d{5}")


class LIDiT(PlainAttention, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The network: noisy latents, timesteps and the captions' LLM states in, prediction out. A
    torch module.

    Build it with `from_settings` or `load`; the arguments are what a saved model's config.json
    holds.

    Args:
        encoders: Encoder name -> width of its states.
        channels: Channels of the latents.
        width: Width of the transformer.
        depth: Its blocks.
        heads: Attention heads.
        patch_size: Side of a patch, latent positions.
        refiner_depth: Blocks of each encoder's token refiner; 0 leaves it out.
        refiner_causal: Whether the refiner keeps the causal mask.
        refiner_gated: Whether its gates depend on the timestep.
        refiner_mixing: Whether its tokens see each other.
        fusion_mode: How several encoders become one condition.
        fusion_depth: Blocks of the collaborative refiner.
        visible_tokens: Caption tokens the model may see; None shows all.
        layers: How the layers that an encoder keeps apart become one.
        stored_layers: Encoder name -> how many layers it keeps apart; one where it is not named.
        guidance_input: Whether the guidance scale is an input, as of a distilled model that needs
            no second pass.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = PromptConditioner._keep_in_fp32_modules
    _no_split_modules = ["LIDiTBlock", "EncoderBranch"]
    _repeated_blocks = ["LIDiTBlock"]

    @register_to_config
    def __init__(
        self,
        encoders: dict[str, int],
        channels: int,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        refiner_depth: int = 2,
        refiner_causal: bool = False,
        refiner_gated: bool = True,
        refiner_mixing: bool = True,
        fusion_mode: Literal["none", "concatenation", "refiner"] = "refiner",
        fusion_depth: int = 1,
        visible_tokens: int | None = None,
        layers: Layers = "one",
        stored_layers: dict[str, int] | None = None,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        self.conditioner = PromptConditioner(
            encoders,
            width,
            heads,
            refiner_depth,
            refiner_causal,
            refiner_gated,
            refiner_mixing,
            fusion_mode,
            fusion_depth,
            visible_tokens,
            layers,
            stored_layers,
            blocks=depth,
        )
        self.transformer = LIDiTTransformer(
            channels, width, depth, heads, patch_size, guidance_input
        )
        initialise(self)
        # The model starts by predicting zero, as DiT does.
        nn.init.zeros_(self.transformer.final_linear.weight)

    @classmethod
    def from_settings(
        cls,
        settings: ModelSettings,
        encoders: Mapping[str, int],
        channels: int,
        stored_layers: Mapping[str, int] | None = None,
    ) -> LIDiT:
        """Make a new model; its weights come from torch's global seed.

        Args:
            settings: A recipe's `model` section.
            encoders: Encoder name -> width of its states.
            channels: Channels of the latents.
            stored_layers: Encoder name -> how many layers of a token its states keep apart: a
                family with
                `join: separate`. One where it is not named.

        Returns:
            The model, on the CPU in float32. It predicts zero until it is trained.

        Raises:
            InputError: Sizes that do not fit each other, or `model.layers` that the encoders do not
                have.
        """
        shape = resolve_shape(settings)
        model = cls(
            encoders=dict(encoders),
            channels=channels,
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
            patch_size=shape.patch_size,
            refiner_depth=settings.refiner.depth,
            refiner_causal=settings.refiner.causal,
            refiner_gated=settings.refiner.gated,
            refiner_mixing=settings.refiner.mixing,
            fusion_mode=settings.fusion.mode,
            fusion_depth=settings.fusion.depth,
            visible_tokens=settings.visible_tokens,
            layers=settings.layers,
            stored_layers=dict(stored_layers) if stored_layers else None,
            guidance_input=False,  # a student's alone
        )
        if settings.activation_checkpointing:
            model.enable_gradient_checkpointing()
            model.transformer.checkpointed_every = settings.checkpointed_every or 1
        return model

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        quantization_config: Any = None,
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            folder: A folder with config.json and safetensors: `model` in a model folder.
            dtype: Of the weights; None keeps them as saved.
            variant: Which of several saved sets of weights, such as "bf16".
            quantization_config: How diffusers stores the linear layers, such as `TorchAoConfig`;
                None as they were saved.

        Returns:
            The model, on the CPU.

        Raises:
            InputError: No such folder or variant, or its safetensors cannot be loaded, lack a
                tensor or hold an unknown tensor.
        """
        if not folder.is_dir():  # else it would be taken for the name of a model on the hub
            raise InputError(
                f"{folder}: no such folder; give the `model` folder of a run of lidit train"
            )
        # diffusers takes whatever the file holds for an object, a text even for a name on the hub.
        read_object(folder / "config.json", "fetch or train the model again")
        if variant:
            _require_variant(folder, variant)
        try:
            # Without the flag a folder that has only a pickle is opened as one, and a pickle can
            # run code.
            model, found = cls.from_pretrained(
                str(folder),
                use_safetensors=True,
                torch_dtype=dtype,
                output_loading_info=True,
                variant=variant,
                quantization_config=quantization_config,
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = one_line(error, 300)
            raise InputError(
                f"{folder}: the model cannot be loaded ({reason}); fetch or train it again"
            ) from None
        # diffusers only logs these, and gives a tensor that is missing any value at all.
        wrong = {
            kind: names
            for kind in ("missing", "unexpected", "mismatched")
            if (names := found[f"{kind}_keys"])
        }
        if wrong:
            listed = "; ".join(
                f"{kind}: {', '.join(map(str, sorted(names)[:3]))}" for kind, names in wrong.items()
            )
            raise InputError(
                f"{folder}: config.json and weights do not belong together ({listed}); fetch "
                "the folder again"
            )
        return model

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input: a guided prediction is then one evaluation."""
        return self.transformer.guidance_embedder is not None

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: Mapping[str, TextStates],
        rows: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict what the objective asks for: clean data, noise or velocity.

        Args:
            latents: [B, C, H, W], noisy; H and W multiples of the patch size.
            timestep: [B] float in [0, 1]; 0 is data, 1 is noise.
            text: Encoder name -> states of B captions, or of R captions with `rows`.
            rows: [B] long, the caption of each latent, where several latents share captions: each
                of the R captions
                is refined once. Latents of one caption must have the same timestep, because the
                refiners depend on
                it: true in sampling, not in training.
            guidance: [B] float, the guidance scale of each latent, for a model that takes it
                (`takes_guidance`); None
                is 1, no guidance.

        Returns:
            [B, C, H, W] in the dtype of the latents.

        Raises:
            InputError: An encoder's states are missing or of a wrong width, or captions and latents
                differ in number.
        """
        captions = len(next(iter(text.values())).states) if text else 0
        if rows is not None:
            of_caption = timestep.new_zeros(captions).scatter(0, rows, timestep)  # [R]
            return self.transformer(
                latents, timestep, self.conditioner(text, of_caption).shared(rows), guidance
            )
        if captions not in (0, len(latents)):
            raise InputError(
                f"{len(latents)} latents need states of as many captions, got {captions}; pass "
                "`rows`, "
                "the caption of each latent, where latents share captions"
            )
        return self.transformer(latents, timestep, self.conditioner(text, timestep), guidance)


def _require_variant(folder: Path, variant: str) -> None:
    """Raises InputError, which names the variants that are there, where this one is not."""
    # Of every name only the variant is left: shards have it before or behind their number.
    stems = [
        SHARD.sub("", path.name.removesuffix(".safetensors"))
        for path in folder.glob(f"{WEIGHTS_NAME}*.safetensors")
    ]
    found = sorted({stem.removeprefix(f"{WEIGHTS_NAME}.") for stem in stems} - {WEIGHTS_NAME})
    if variant not in found:
        raise InputError(
            f"{folder}: has no variant {variant!r}; "
            + (f"give one of {', '.join(found)}, or none" if found else "it has none: leave it out")
        )
