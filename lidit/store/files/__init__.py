"""Files wherever they are: a local folder or a URL, read through a cache, written whole or not at
all.
"""
