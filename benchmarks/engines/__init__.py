"""Engines that load what is saved here, against transformers 5."""
