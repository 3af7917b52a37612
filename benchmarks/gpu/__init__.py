"""Is S²-Attn right on this GPU, and how fast? For a machine with a GPU and without a network."""
