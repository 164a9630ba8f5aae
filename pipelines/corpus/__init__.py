"""Making a corpus on a cluster: ingest, LLM states, latents."""
