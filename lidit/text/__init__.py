"""Captions to LLM states: encoder spec, instruction prefix, tokens, batches, truncated trunk (paper section 3.1)."""
