"""Every decoder family with the default adapter: the merged folder is transformers + PEFT.

Adapters are PEFT's own, every tensor of them moved; both sides compute in float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import move_and_save, wrapped
from families import FAMILIES
from family_models import build_family
from peft import PeftModel
from transformers import AutoConfig

from longlora_plugin.merge.folder import Source, merge

IDS = torch.randint(10, 97, (1, 21), generator=torch.Generator().manual_seed(1))
TOLERANCE = 3e-5
"""Largest difference of logits; a right merge in float32 stays below it."""


def logits(model: torch.nn.Module, name: str) -> torch.Tensor:
    zeros = {key: torch.zeros_like(IDS) for key in FAMILIES[name].zeros}
    torch.manual_seed(0)  # some routers draw
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False, **zeros).logits


def merged_and_expected(
    tmp_path: Path, name: str, **options: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the merged folder, of the base with its adapter, and of the base."""
    base, adapter, target = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    model = build_family(name, FAMILIES[name], "eager").float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.div_(3.0)  # made large there, to show wrong masks
    model.save_pretrained(base)
    kind = type(model)
    move_and_save(wrapped(model, **options), adapter)

    def load(folder: Path) -> torch.nn.Module:
        return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    original = load(base)
    plain = logits(original, name)
    expected = logits(PeftModel.from_pretrained(original, adapter), name)
    merge(Source(adapter, base, AutoConfig.from_pretrained(base)), target)
    return logits(load(target), name), expected, plain


OPTIONS = {
    # Axolotl teaches PEFT the clipped linear layers of its vision tower.
    "gemma4": {"target_modules": r".*language_model.*\.(q|k|v|o)_proj"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_model_of_every_family_is_the_trained_one(tmp_path, name):
    merged, expected, plain = merged_and_expected(tmp_path, name, **OPTIONS.get(name, {}))
    if name == "youtu":
        # While it loads this family, transformers sets the padding token's row to zero.
        merged, expected = merged[..., 1:], expected[..., 1:]
        plain = plain[..., 1:]
    assert (expected - plain).abs().max() > 0.01
    assert (merged - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["glm4_moe", "mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_lora_on_experts_is_merged(tmp_path, name):
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if name == "llama4_text":
        parameters = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    merged, expected, plain = merged_and_expected(
        tmp_path, name, target_parameters=parameters, modules_to_save=None
    )
    assert (expected - plain).abs().max() > 0.01
    assert (merged - expected).abs().max() < TOLERANCE
