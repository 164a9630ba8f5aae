"""Captioned picture sets that package registries hold: fetched, checked, written as WebDataset tars in two parts."""

from lidit.picture_sets.clipart import OPENCLIPART
from lidit.picture_sets.emoji import EMOJI, FLUENT_EMOJI
from lidit.picture_sets.packages import Package, fetch
from lidit.picture_sets.pictures import LeftOut, Picture, PictureSet
from lidit.picture_sets.stamps import TUXPAINT
from lidit.picture_sets.writing import WrittenSet, write_picture_set

SETS = {made.name: made for made in (EMOJI, FLUENT_EMOJI, TUXPAINT, OPENCLIPART)}

__all__ = ["SETS", "LeftOut", "Package", "Picture", "PictureSet", "WrittenSet", "fetch", "write_picture_set"]
