"""The official prompt suites: their prompts, the layout their scorers read, the results those
write.
"""
