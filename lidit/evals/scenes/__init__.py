"""Scenes scored by program: what is in a picture, whether it is what the prompt asked for, and how
that varies.
"""
