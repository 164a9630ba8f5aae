"""Latents columns: exact for float32 and 8-bit pixels, bfloat16 to rounding, never anything that is
not finite.
"""

import io

import pytest
import torch

from lidit.errors import InputError, JobError
from lidit.store import Crop, latents_table
from lidit.store.files.atomic import arrow_writer
from lidit.store.latent_file import LatentFile


def stored(table: object) -> LatentFile:
    sink = io.BytesIO()
    arrow_writer([table])(sink)  # type: ignore[list-item]
    return LatentFile.load(bytearray(sink.getvalue()), "here")


SHAPES = [(3, 4, 6), (3, 8, 2), (3, 1, 1)]
LATENTS = [
    torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)
]
CROPS = [Crop(i, 2, 30, 40) for i in range(3)]


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 0.0), ("bfloat16", 0.02)])
def test_round_trip_with_posterior(storage: str, tolerance: float) -> None:
    deviations = [latent.abs() for latent in LATENTS]
    table = latents_table(LATENTS, CROPS, storage, deviations)
    table.validate(full=True)
    assert table["tokens"].to_pylist() == [24, 16, 1]
    assert table["crop"].to_pylist()[1] == {"left": 1, "top": 2, "width": 30, "height": 40}
    file = stored(table)
    assert file.shapes == SHAPES
    for back, latent in zip(file.latents(None, None), LATENTS):
        assert back.dtype == torch.float32
        assert (back - latent).abs().max() <= tolerance
    drawn = file.latents([2, 0], [7, 8])
    for value, row, seed in zip(drawn, [2, 0], [7, 8]):
        noise = torch.randn(SHAPES[row], generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(
            value, LATENTS[row] + deviations[row] * noise, atol=4 * tolerance + 1e-6
        )


def test_eight_bit_pixels_are_exact() -> None:
    every = torch.arange(256).view(1, 16, 16).float() / 127.5 - 1
    back = stored(latents_table([every], [CROPS[0]], "uint8")).latents(None, None)[0]
    assert torch.equal(((back + 1) * 127.5).round(), ((every + 1) * 127.5).round())
    assert (back - every).abs().max() < 1e-6
    assert stored(latents_table([every], [CROPS[0]], "uint8")).latents(None, [3])[0].equal(back)


def test_mistakes_are_named() -> None:
    with pytest.raises(JobError, match="row 1"):
        latents_table([LATENTS[0], torch.full((3, 1, 1), float("nan"))], CROPS[:2], "float32")
    with pytest.raises(InputError, match="float16"):
        latents_table(LATENTS, CROPS, "float16")
    with pytest.raises(IndexError):
        stored(latents_table(LATENTS, CROPS, "float32")).latents([3], None)
