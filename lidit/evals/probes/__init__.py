"""Linear probes of LLM states: what the state of each token tells about the scene."""
