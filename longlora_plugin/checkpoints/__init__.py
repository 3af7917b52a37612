"""Checkpoints of a run, and those of the original LongLoRA project."""
