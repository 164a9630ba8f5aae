"""Scenes of coloured shapes whose truth is known: drawn, described, written as shards, asked for as
prompts.
"""
