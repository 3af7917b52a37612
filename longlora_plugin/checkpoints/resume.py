"""Which checkpoint a run may go on from: complete ones only.

The trainer writes a checkpoint file by file into its final folder, `trainer_state.json` last. A run
killed while it writes leaves a folder that Axolotl's `auto_resume_from_checkpoints` takes for the
newest checkpoint; what is missing then starts anew without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import checkpoints, unreadable_files, why_no_adapter

FSDP_FULL_MODEL = "pytorch_model_fsdp.bin"


def why_not_resumable(
    folder: Path, *, weights_only: bool = False, adapter: bool = True
) -> str | None:
    """What a checkpoint lacks; None if a run can go on from it.

    Args:
        folder: a `checkpoint-<step>` folder of the trainer, of DeepSpeed or of FSDP.
        weights_only: the recipe says `save_only_model: true`, so no optimizer state is expected.
        adapter: the run trains an adapter rather than the whole model.
    """
    if not folder.is_dir():
        return "there is no such folder"
    state = folder / "trainer_state.json"
    if not state.is_file():
        return "it has no trainer_state.json: writing it did not finish"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return "its trainer_state.json is cut off"
    if adapter and (folder / FSDP_FULL_MODEL).is_file():
        return (
            "it was written with fsdp_config: {state_dict_type: FULL_STATE_DICT}, which keeps only "
            "the first process's part of an adapter"
        )
    return next(_damage(folder, weights_only), None)


def check_adapter(start: Any) -> None:
    """Raise ValueError unless the adapter that a run continues from can be loaded.

    Args:
        start: the recipe's `lora_model_dir`; a name on the hub is not looked at.
    """
    if start and (Path(start).exists() or str(start).startswith((".", "/"))):
        problem = why_no_adapter(Path(start))
        if problem:
            raise ValueError(
                f"lora_model_dir: {start} holds no adapter: {problem}; name a folder with "
                "adapter_config.json and adapter_model.safetensors"
            )


def choose_checkpoint(
    output_dir: Path,
    *,
    named: Any = None,
    newest: bool = False,
    weights_only: bool = False,
    adapter: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Which checkpoint a run resumes from.

    Args:
        output_dir: of the run.
        named: the recipe's `resume_from_checkpoint`.
        newest: its `auto_resume_from_checkpoints`.
        weights_only, adapter: as in `why_not_resumable`.

    Returns:
        The keys to write into the recipe, and warnings: one for each folder that is passed over.

    Raises:
        ValueError: the checkpoint that the recipe names cannot be used.
    """
    expected = {"weights_only": weights_only, "adapter": adapter}
    if named and isinstance(named, str | Path):
        problem = why_not_resumable(Path(named), **expected)
        if problem is None:
            return {}, []
        good = _last_good(output_dir, expected)[0]
        raise ValueError(
            f"resume_from_checkpoint: {named} cannot be resumed: {problem}; "
            + (
                f"the last complete checkpoint is {good}"
                if good
                else f"{output_dir} has no complete checkpoint: remove resume_from_checkpoint"
            )
        )
    if not newest or not checkpoints(output_dir):
        return {}, []
    good, skipped = _last_good(output_dir, expected)
    warnings = [f"{folder} is passed over: {problem}" for folder, problem in skipped.items()]
    if good is not None:
        return {"resume_from_checkpoint": str(good)}, warnings
    warnings.append(f"{output_dir} has no complete checkpoint: training starts at step 0")
    return {"auto_resume_from_checkpoints": False}, warnings


def _last_good(output_dir: Path, expected: dict[str, bool]) -> tuple[Path | None, dict[Path, str]]:
    skipped: dict[Path, str] = {}
    for folder in reversed(checkpoints(output_dir)):
        problem = why_not_resumable(folder, **expected)
        if problem is None:
            return folder, skipped
        skipped[folder] = problem
    return None, skipped


def _damage(folder: Path, weights_only: bool) -> Iterator[str]:
    yield from unreadable_files(folder)
    latest = folder / "latest"
    shards = [folder / name for name in ("pytorch_model_fsdp_0", "optimizer_0")]
    steps = list(folder.glob("global_step*"))
    if latest.is_file() or steps:
        yield from _deepspeed_damage(folder, latest)
    elif any(shard.is_dir() for shard in shards):
        for shard in shards if not weights_only else shards[:1]:
            if not (shard / ".metadata").is_file():
                yield f"its {shard.name} has no .metadata: writing it did not finish"
    else:
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*model*.bin")):
            yield "it has no adapter_model.safetensors"
        if not weights_only and not any(folder.glob("optimizer.*")):
            yield "it has no optimizer state (optimizer.pt)"


def _deepspeed_damage(folder: Path, latest: Path) -> Iterator[str]:
    if not latest.is_file():
        yield "DeepSpeed's file `latest` is missing: writing it did not finish"
        return
    step = folder / latest.read_text(encoding="utf-8").strip()
    optimizers = len(list(step.glob("*_optim_states.pt")))
    if not optimizers or not any(step.glob("*_model_states.pt")):
        yield f"DeepSpeed's {step.name} has no states"
    processes = len(list(folder.glob("rng_state_*.pth")))
    if processes and optimizers < processes:
        yield f"DeepSpeed's {step.name} holds {optimizers} of {processes} processes' states"
