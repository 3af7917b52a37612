"""Bytes and collectives of S²-Attn over several processes, counted on gloo."""
