"""Small random autoencoders of every class a codec can be, saved as diffusers saves them."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny


def save_codec(folder: Path, kind: str, seed: int = 0) -> Path:
    """Factor 4 (AutoencoderKL: 2), 4 latent channels; scaling and shift are not 1 and 0 where a
    class has them.
    """
    torch.manual_seed(seed)
    if kind == "AutoencoderKL":
        model = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
    elif kind == "AutoencoderTiny":
        model = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    else:
        model = AutoencoderDC(
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            latent_channels=4,
            attention_head_dim=4,
            scaling_factor=0.4,
        )
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder
