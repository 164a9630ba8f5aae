"""Marks by which a picture can be recognised later: a signed manifest, an invisible watermark, a
log of hashes.
"""
