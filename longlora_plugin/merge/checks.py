"""Before Axolotl's merge: what cannot be merged is refused by name.

An adapter that is incomplete or belongs to another base would be merged in silence: Axolotl's
default method goes through a base's files tensor by tensor and takes no notice of an adapter's
tensors that fit none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import checkpoints, why_no_adapter
from longlora_plugin.merge.tensors import (
    INDEX,
    PREFIX,
    adapter_shapes,
    is_readable,
    model_without_weights,
    shards_of,
    tied_names,
)


def check_adapter_folder(folder: Path) -> None:
    """Raise ValueError unless a folder holds a complete adapter; name the last good checkpoint."""
    problem = why_no_adapter(folder)
    if problem is None:
        return
    good = [each for each in checkpoints(folder) if why_no_adapter(each) is None]
    hint = (
        f"the last checkpoint with one is {good[-1]}: write lora_model_dir: {good[-1]}"
        if good
        else "train first, or write lora_model_dir: <folder of the adapter>"
    )
    raise ValueError(f"nothing to merge: {folder} holds no adapter: {problem}; {hint}")


def check_base_folder(base_model: str) -> None:
    """Raise ValueError where a local base model lacks weights, or one of its files is cut off."""
    folder = Path(base_model)
    if not folder.is_dir():
        return  # a name; Axolotl downloads it whole
    index = folder / INDEX
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ValueError(
                f"base_model: {base_model} is incomplete: {INDEX} names {', '.join(missing)}, "
                "which is not there; get it again"
            )
    for shard in shards_of(folder):
        if not is_readable(shard):
            raise ValueError(
                f"base_model: {base_model}: {shard.name} is cut off or damaged; get it again"
            )


def check_fits(adapter_dir: Path, base_model: str, base_config: Any) -> None:
    """Compare an adapter's tensors with what PEFT makes of its config on this base.

    Reads names and shapes only; the base is built without weights.

    Args:
        base_config: transformers config of the base model.

    Raises:
        ValueError: the adapter belongs to another base; names the first tensors that do not fit.
    """
    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        return  # another method's names and shapes; PEFT and Axolotl judge
    base = model_without_weights(base_config)
    if base is None:
        return
    held = adapter_shapes(adapter_dir)
    known = {name: tuple(p.shape) for name, p in base.named_parameters(remove_duplicate=False)}
    tied = tied_names(base)
    wrong = list(_misfits(held, _expected(base, adapter_dir), known, tied))
    if wrong:
        made_for = config.get("base_model_name_or_path")
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the adapter in {adapter_dir} does not fit base_model: {base_model}: "
            f"{'; '.join(wrong[:3])}{more}. It was trained on {made_for}: write that as "
            "base_model, or another lora_model_dir"
        )


def check_not_quantized(base_model: str, base_config: Any, merges: bool) -> None:
    """Raise ValueError where the base's own weights are quantized and the merge cannot undo that.

    Args:
        merges: whether Axolotl's merge, with the method asked for, knows such a base.
    """
    quantization = getattr(base_config, "quantization_config", None)
    if not quantization or merges:
        return
    raise ValueError(
        f"merge-lora cannot merge into a quantized base: base_model: {base_model} is stored in "
        f"{quantization_method(base_config)}. Write base_model: <the 16-bit model it was made "
        "from>; the adapter stays as it is (load_in_4bit and load_in_8bit need no change)"
    )


def quantization_method(base_config: Any) -> str | None:
    """How a base's weights are stored, as its config says; None for plain ones."""
    quantization = getattr(base_config, "quantization_config", None)
    if not quantization:
        return None
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    method = str(quantization.get("quant_method") or "an unnamed format")
    if method == "bitsandbytes":
        method += " 8-bit" if quantization.get("load_in_8bit") else " 4-bit"
    return method


def _expected(base: Any, adapter_dir: Path) -> dict[str, tuple[int, ...]] | str:
    """Name → shape of what PEFT would save; a text where it cannot wrap the base at all."""
    import warnings

    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ties and initialisation: nothing is trained
            config = PeftConfig.from_pretrained(str(adapter_dir))
            config.init_lora_weights = True  # some methods look at the weights to begin with
            model = get_peft_model(base, config)
    except ValueError as error:
        return str(error).split(". ")[0]
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _misfits(
    held: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]] | str,
    known: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, set[str]],
) -> Iterator[str]:
    if isinstance(expected, str):
        yield expected
        return
    for name, shape in expected.items():
        plain = name.removeprefix(PREFIX)
        if name not in held:
            # PEFT saves a tied pair under one of its names.
            if not any(PREFIX + twin in held for twin in tied.get(plain, ())):
                yield f"it has no {plain}"
        elif held[name] != shape and not _grew(name, held[name], shape):
            yield f"{plain} is {list(held[name])}, the base's {list(shape)}"
    for name in sorted(held.keys() - expected.keys()):
        plain = name.removeprefix(PREFIX)
        if plain not in known:
            yield f"the base has no {plain}"
        elif held[name] != known[plain] and not _grew(name, held[name], known[plain]):
            yield f"{plain} is {list(held[name])}, the base's {list(known[plain])}"


def _grew(name: str, held: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Whether a table has more rows than the base's: Axolotl adds them for new tokens."""
    table = ".lora_" not in name and len(held) == len(base) == 2
    return table and held[0] > base[0] and held[1] == base[1]


# ---- after the merge ------------------------------------------------------------------------
