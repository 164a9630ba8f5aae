"""Pixels keep their 8 bits through every range, and what lies outside a range is cut off where that
is said.
"""

import pytest
import torch

from lidit.pixels import from_bytes, to_bytes, to_levels, to_unit, unit_to_bytes

BYTES = torch.arange(256, dtype=torch.uint8)


def test_eight_bits_come_back_from_every_range() -> None:
    pixels = from_bytes(BYTES)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(to_bytes(pixels), BYTES)
    assert torch.equal(to_levels(pixels), BYTES.float())
    assert torch.equal(unit_to_bytes(to_unit(pixels)), BYTES)
    assert torch.equal(BYTES, torch.arange(256, dtype=torch.uint8)), "the input is not changed"


def test_the_arithmetic_is_that_of_the_files_written_so_far() -> None:
    assert torch.equal(from_bytes(BYTES), BYTES.float() / 127.5 - 1)
    between = torch.linspace(-1.2, 1.2, 10_001)
    assert torch.equal(
        to_bytes(between), ((between + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    )
    assert torch.equal(to_unit(between), ((between + 1) / 2).clamp(0, 1))


def test_only_some_cut_off_what_is_outside() -> None:
    outside = torch.tensor([-1.5, 1.5])
    assert to_bytes(outside).tolist() == [0, 255]
    assert to_unit(outside).tolist() == [0, 1]
    assert to_levels(outside).tolist() == [-64, 319]


def test_pixels_that_are_no_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match="expected uint8"):
        from_bytes(BYTES.float())
