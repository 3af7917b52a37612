"""What a saved folder says about itself (`longlora.json`, the model card), and how to load it."""

from __future__ import annotations
