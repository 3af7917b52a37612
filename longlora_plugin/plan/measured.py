"""The share of a GPU's peak that training reaches: measured by `make gpu`, else assumed.

`measured.json`, GPU → share, is written by `docs/generate.py` from the results that
docs/reference/gpu.md shows; a GPU that nobody measured is not in it.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.plan.cost import FLOPS_SHARE
from longlora_plugin.plan.gpus import GPUS, Gpu

FILE = Path(__file__).with_name("measured.json")


def shares_of(results: Mapping[str, Any]) -> dict[str, float]:
    """GPU → share of its peak: the median over the steps with S² in the results of `make gpu`."""
    shares: dict[str, list[float]] = defaultdict(list)
    for row in results["rows"]:
        card, result = _card_of(str(row.get("machine"))), row.get("result") or {}
        if card and card.tflops and result.get("planned_tflop") and row.get("attention") == "s2":
            shares[card.name].append(result["planned_tflop"] / result["seconds"] / card.tflops)
    return {name: round(statistics.median(each), 3) for name, each in shares.items()}


def flops_share_of(card: Gpu) -> tuple[float, str]:
    """The share to plan with on this GPU, and whether it is `measured` or `assumed`."""
    measured = json.loads(FILE.read_text(encoding="utf-8"))
    if card.name in measured:
        return measured[card.name], "measured"
    return FLOPS_SHARE, "assumed"


def _card_of(machine: str) -> Gpu | None:
    words = machine.lower().replace(" ", "")
    alike = [card for name, card in GPUS.items() if name.split("-")[0] in words]
    return next((card for card in alike if card.name.split("-")[1] in words), None) or (
        alike[0] if len(alike) == 1 else None
    )
