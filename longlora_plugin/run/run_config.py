"""The config that a finished run trained with: what it saved, not what the recipe says by now.

Between training and merging or evaluating, a recipe changes: its RoPE is edited, `--sequence-len`
was given on the command line, `model_config` is forgotten. The run's `config.json` is the source.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from longlora_plugin.rope import keep_both_spellings, rope_parameters_of
from longlora_plugin.rope.spelling import OLD_NAMES, ORIGINAL
from longlora_plugin.run.prepare import PreparedRun

NOT_THE_RUNS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype"),
    *("transformers_version", "use_cache", "vocab_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Fields that saving, added tokens and the tokenizer change."""


def trained_config(run: PreparedRun, base_config: Any, folder: Path) -> tuple[Any, list[str]]:
    """The base model's config as the run in `folder` changed it.

    Args:
        run: what the recipe comes to now.
        base_config: transformers config of the base model; not changed.
        folder: a run's output_dir, or another folder of an adapter.

    Returns:
        The config, and a line for each field of which the recipe says something else by now. It is
        the recipe's own where the folder has no config.json.

    Raises:
        ValueError: config.json cannot be read, or is that of another type of model.
    """
    told = run.config_of(base_config)
    path = folder / "config.json"
    if not path.is_file():
        return told, []
    try:
        saved = type(base_config).from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); train again, or remove it") from None
    found = saved.get_config_dict(str(folder))[0].get("model_type")
    if found != base_config.model_type:
        raise ValueError(
            f"{path} is of a {found} model, the base model {run.base_model} is "
            f"{base_config.model_type}: the folder belongs to another base model"
        )
    theirs, ours, base = _fields(saved), _fields(told), _fields(base_config)
    config = copy.deepcopy(base_config)
    notes = []
    for field in sorted(theirs.keys() | ours.keys()):
        value = theirs.get(field)
        if value != base.get(field):
            setattr(config, field, copy.deepcopy(value))
        if value != ours.get(field):
            notes.append(
                f"{field}: the run in {folder} trained with {value}, the recipe now gives "
                f"{ours.get(field)}; what was trained counts"
            )
    return config, notes


def _fields(config: Any) -> dict[str, Any]:
    """A config's fields, RoPE in the one spelling that counts however it was written."""
    written = copy.deepcopy(config)
    keep_both_spellings(written)
    read = type(config).from_dict(written.to_dict())
    skipped = {*NOT_THE_RUNS, *OLD_NAMES}
    if not hasattr(type(config)(), ORIGINAL):
        skipped.add(ORIGINAL)  # of the family's own fields only Phi-3 has it
    fields = {name: value for name, value in read.to_dict().items() if name not in skipped}
    return {**fields, "rope_parameters": rope_parameters_of(read)}
