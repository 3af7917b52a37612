"""Measurements: the attention benchmark, the study, and the experiments of the Makefile."""
