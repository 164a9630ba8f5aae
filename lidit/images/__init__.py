"""From image bytes of unknown origin to pixels a codec can take."""

from lidit.images.buckets import Bucket, Buckets, fit
from lidit.images.decode import BadImageError, DecodedImage, decode_image

__all__ = ["BadImageError", "Bucket", "Buckets", "DecodedImage", "decode_image", "fit"]
