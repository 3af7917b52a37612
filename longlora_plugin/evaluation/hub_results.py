"""Scores in the form that the Hugging Face hub reads from `.eval_results/*.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from longlora_plugin.checkpoints.files import write_text
from longlora_plugin.evaluation.models import ADAPTER, MERGED, TRAINED
from longlora_plugin.evaluation.results import Row
from longlora_plugin.evaluation.tables import labels_of

DATASETS = {
    "longbench2": "zai-org/LongBench-v2",
    "babilong": "RMT-team/babilong-1k-samples",
    "graphwalks": "openai/graphwalks",
    "niah": "NVIDIA/RULER",
    "ruler": "NVIDIA/RULER",
}
"""Beginning of a task's name → the benchmark's name on the hub."""


def trained_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of what the recipe trained; [] where they are of other models only."""
    labels = labels_of(rows)
    label = next((name for name in (ADAPTER, TRAINED, MERGED) if name in labels), None)
    return [row for row in rows if row["model"] == label]


def write_eval_results(rows: Sequence[Row], folder: Path) -> Path:
    """Write the scores of what was trained, or of the last model where nothing was.

    Returns:
        The file, `.eval_results/longlora.yaml` in `folder`.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = []
    for row in trained_rows(rows) or [row for row in rows if row["model"] == labels_of(rows)[-1]]:
        task = row["task"]
        dataset = next((name for start, name in DATASETS.items() if task.startswith(start)), task)
        limit = f", first {row['limit']} examples" if row["limit"] else ""
        entries.append(
            EvalResultEntry(
                dataset_id=dataset,
                task_id=f"{task}_{row['length']}",
                value=round(100 * row["score"], 2),
                date=datetime.now(UTC).strftime("%Y-%m-%d"),
                notes=f"lm-eval {row['lm_eval']}, {row['length']} tokens, {row['metric']}{limit}",
            )
        )
    path = folder.expanduser() / ".eval_results" / "longlora.yaml"
    text: str = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    write_text(path, text)
    return path
