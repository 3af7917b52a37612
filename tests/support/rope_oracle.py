"""The presets' frequencies [rotary_dim / 2], written out in float64 from the papers."""

from __future__ import annotations

import math

import numpy as np
from rope_families import ORIGINAL, lists


def plain(theta, dim):
    return np.float64(theta) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def linear_frequencies(theta, dim, factor):
    return plain(theta, dim) / factor


def ntk_frequencies(theta, dim, stretch):
    return plain(theta * stretch ** (dim / (dim - 2)), dim)


def dynamic_frequencies(theta, dim, factor, length, original):
    grown = factor * max(length, original) / original - (factor - 1)
    return plain(theta * grown ** (dim / (dim - 2)), dim)


def yarn_frequencies(theta, dim, factor, original, fast=32.0, slow=1.0, truncate=True):
    def pair_turning(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(fast), pair_turning(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    divided = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return plain(theta, dim) * (divided / factor + 1 - divided)


def llama3_frequencies(theta, dim, factor, original, low=1.0, high=4.0):
    frequencies = plain(theta, dim)
    rotations = original * frequencies / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def longrope_frequencies(theta, dim, divisors):
    return plain(theta, dim) / np.asarray(divisors, dtype=np.float64)


def expected_frequencies(preset, theta, dim):
    """At rest: of a model that has not seen a sequence beyond the original context."""
    return {
        "linear": lambda: linear_frequencies(theta, dim, 4),
        "dynamic": lambda: plain(theta, dim),
        "ntk": lambda: ntk_frequencies(theta, dim, 4),
        "theta": lambda: plain(2e7, dim),
        "auto": lambda: yarn_frequencies(theta, dim, 4, ORIGINAL),
        "yarn": lambda: yarn_frequencies(theta, dim, 4, ORIGINAL),
        "llama3": lambda: llama3_frequencies(theta, dim, 4, ORIGINAL),
        "longrope": lambda: longrope_frequencies(theta, dim, lists(dim)["short_factor"]),
        "none": lambda: plain(theta, dim),
    }[preset]()
