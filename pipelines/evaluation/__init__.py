"""Measuring trained models: scenes, captions, official suites, held-out pictures, comparisons,
probes.
"""
