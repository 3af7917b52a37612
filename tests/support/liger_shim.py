"""Test-only Axolotl plugin: Liger's fused loss by definition, for a CPU; all else is Liger's."""

import torch
from axolotl.integrations.base import BasePlugin


def fused_linear_cross_entropy(hidden, weight, target, *, reduction, ignore_index, **_):
    logits = (hidden @ weight.T).float()
    return torch.nn.functional.cross_entropy(
        logits, target, reduction=reduction, ignore_index=ignore_index
    )


class LigerShim(BasePlugin):
    def register(self, cfg):
        from liger_kernel.transformers import functional

        functional.liger_fused_linear_cross_entropy = fused_linear_cross_entropy
