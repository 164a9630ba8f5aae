"""Evidence: scenes whose truth is known, a deterministic scorer, curves, and the official
benchmarks' formats.
"""
