"""GPU → share of its peak that training reached, from the results of `make gpu`.

`docs/generate.py` writes it to `plan/measured.json`, which `plan` takes before its own assumption.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from longlora_plugin.plan.gpus import GPUS, Gpu


def shares_of(results: Mapping[str, Any]) -> dict[str, float]:
    """GPU → share of its peak: the median over the steps with S² in the results of `make gpu`."""
    shares: dict[str, list[float]] = defaultdict(list)
    for row in results["rows"]:
        card, result = _card_of(str(row.get("machine"))), row.get("result") or {}
        if card and card.tflops and result.get("planned_tflop") and row.get("attention") == "s2":
            shares[card.name].append(result["planned_tflop"] / result["seconds"] / card.tflops)
    return {name: round(statistics.median(each), 3) for name, each in shares.items()}


def _card_of(machine: str) -> Gpu | None:
    words = machine.lower().replace(" ", "")
    alike = [card for name, card in GPUS.items() if name.split("-")[0] in words]
    return next((card for card in alike if card.name.split("-")[1] in words), None) or (
        alike[0] if len(alike) == 1 else None
    )
