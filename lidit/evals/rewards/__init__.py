"""What a picture is worth for its prompt, 0 to 1: by the scene scorer, a function of one's own, or
a model asked.
"""
