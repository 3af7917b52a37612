"""S²-Attn against full attention and the published algorithm: seconds and bytes."""
