"""A base model's folder with an adapter's RoPE, for loaders that take RoPE from the base model.

PEFT and transformers build an adapter's base model from `base_model_name_or_path`, with the config
that is there. Where that folder has the trained config and the base's own weights, as links,
`AutoPeftModelForCausalLM` and `PeftModel` load the adapter right as they are, and a server of LoRA
adapters needs no option for RoPE.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from longlora_plugin.artifacts.callback import name_for_older_readers
from longlora_plugin.checkpoints.files import ADAPTER_CONFIG, read_json, write_json
from longlora_plugin.checkpoints.run_config import config_json, for_base_weights
from longlora_plugin.merge import folder
from longlora_plugin.merge.stored import files_to_load


def extend_base(source: folder.Source, target: Path) -> list[str]:
    """Write the extended base model's folder, and name it in the adapter.

    Args:
        source: the adapter and its base model.
        target: a folder that is not there yet.

    Returns:
        A line for each limit of the base model's files that was raised.

    Raises:
        ValueError: there is such a folder, the adapter is of another kind of model, or the result
            does not load.
    """
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or write another folder")
    config = for_base_weights(folder.trained_config_of(source)[0], source.base_config)
    raw = read_json(source.base_dir / "config.json")
    with folder.swapped_in(target) as draft:
        for file in files_to_load(source.base_dir):
            _link(file.resolve(), draft / file.name)
        for index in source.base_dir.glob("*.index.json"):
            shutil.copyfile(index, draft / index.name)
        folder.copy_other_files(source, draft)
        name_for_older_readers(draft)
        write_json(draft / "config.json", config_json(raw, source.base_config, config))
        notes = folder.raise_limits_of_base(source, draft)
        folder.check_loads(draft, remote_code=source.remote_code)
    path = source.adapter_dir / ADAPTER_CONFIG
    write_json(path, {**read_json(path), "base_model_name_or_path": str(target.resolve())})
    return notes


def _link(file: Path, name: Path) -> None:
    """A second name of a file: a hard link, which outlives the first name, or a symbolic one."""
    try:
        os.link(file, name)
    except OSError:  # another file system
        name.symlink_to(file)
