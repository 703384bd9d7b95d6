"""Read a Hugging Face model: architecture, layout of its layers, packed weights, RoPE, fingerprint."""
