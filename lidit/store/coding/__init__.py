"""Text states in fewer bits: a linear transform with one uniform step, and an entropy coder that is
exact.
"""
