"""The model as a classifier of captions: whose loss is lower, the true caption's or
a wrong one's.
"""
