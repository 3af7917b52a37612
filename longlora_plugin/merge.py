"""What a merge needs before and after Axolotl's own, so that the folder holds the trained model.

Before: an adapter that is incomplete or belongs to another base is refused by name. Axolotl's
default method goes through a base's files tensor by tensor and takes no notice of an adapter's
tensors that fit none of them.

After: that method copies the base's `config.json` and tokenizer, takes from fully trained modules
the weights but not the biases, and in Axolotl 0.19 rounds the output head of a 4-bit run to NF4,
which no training saw. `complete` puts each right; everything else is Axolotl's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.resume import checkpoints, why_no_adapter

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


# ---- before the merge -----------------------------------------------------------------------


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
    for shard in _shards(folder):
        if not _readable(shard):
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
    base = skeleton(base_config)
    if base is None:
        return
    held = _shapes_in_file(adapter_dir)
    known = {name: tuple(p.shape) for name, p in base.named_parameters(remove_duplicate=False)}
    twins = _ties(base)
    wrong = list(_misfits(held, _expected(base, adapter_dir), known, twins))
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


def skeleton(base_config: Any) -> Any:
    """The base model without weights (meta tensors); None where transformers cannot build one."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(base_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError):
        return None  # not a plain causal language model


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
    twins: Mapping[str, set[str]],
) -> Iterator[str]:
    if isinstance(expected, str):
        yield expected
        return
    for name, shape in expected.items():
        plain = name.removeprefix(PREFIX)
        if name not in held:
            # PEFT saves a tied pair under one of its names.
            if not any(PREFIX + twin in held for twin in twins.get(plain, ())):
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


def complete(
    adapter_dir: Path,
    merged_dir: Path,
    base_dir: Path,
    base_config: Any,
    *,
    config_fields: Mapping[str, Any],
    original_context: int,
    target_context: int,
) -> list[str]:
    """Make a merged folder the model that was trained. A second call changes nothing.

    Args:
        adapter_dir: the adapter that was merged.
        merged_dir: what Axolotl's merge wrote.
        base_dir: the base model's folder.
        base_config: its transformers config.
        config_fields: `rope_parameters` and `max_position_embeddings` of the run; {} keeps them.
        original_context, target_context: tokens before and after the extension.

    Returns:
        A line for each thing that was put right.

    Raises:
        ValueError: the folder has no weights or no config, or a trained tensor has no place in it.
    """
    notes = []
    _name_for_loaders(merged_dir)
    stale = remove_stale_weights(merged_dir)
    if stale:
        notes.append(f"removed weights of an earlier merge: {', '.join(stale)}")
    if config_fields:
        write_config_fields(merged_dir, config_fields)
        notes.append(f"config.json has {dict(config_fields)}")
    wrong = wrong_tensors(adapter_dir, merged_dir, base_dir, base_config)
    if wrong:
        write_tensors(merged_dir, wrong)
        notes.append(f"put right {len(wrong)} tensors that the merge left out or rounded")
    for name in TOKENIZER_FILES:
        if (adapter_dir / name).is_file():
            _copy(adapter_dir / name, merged_dir / name)
    # The older method sets do_sample in it.
    if (base_dir / "generation_config.json").is_file():
        _copy(base_dir / "generation_config.json", merged_dir / "generation_config.json")
    if config_fields:
        notes += _raise_limits(merged_dir, original_context, target_context)
    return notes


def write_config_fields(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Set fields of a folder's `config.json`; whether it changed.

    Old spellings of RoPE are removed: transformers would read them beside the new one.

    Raises:
        ValueError: the folder has no `config.json`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: the merge did not finish")
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = {**config, **fields}
    if "rope_parameters" in fields:
        for old in ("rope_scaling", "rope_theta"):
            changed.pop(old, None)
    if changed == config:
        return False
    _write_json(path, changed)
    return True


def local_folder(base_model: str, revision: str | None = None) -> Path:
    """The folder of a base model, by its path, or by its name where it has been downloaded."""
    if Path(base_model).is_dir():
        return Path(base_model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base_model, revision=revision, local_files_only=True))


def _name_for_loaders(folder: Path) -> None:
    """Of a base with one pytorch_model.bin the merge makes a file that no loader looks for."""
    odd = folder / "pytorch_model.safetensors"
    if odd.is_file():
        odd.replace(folder / WHOLE)


def remove_stale_weights(folder: Path) -> list[str]:
    """Delete weight files that an earlier merge, with other files, left behind; their names.

    The newer of the whole file and the index is this merge's; loaders disagree which they take.
    """
    index, whole = folder / INDEX, folder / WHOLE
    shards = {path.name for path in folder.glob("*model-*-of-*.safetensors")}
    if not whole.is_file() and not index.is_file():
        raise ValueError(f"{folder} has no {WHOLE}: the merge did not finish")
    if whole.is_file() and (
        not index.is_file() or whole.stat().st_mtime_ns >= index.stat().st_mtime_ns
    ):
        stale = shards | ({INDEX} if index.is_file() else set())
    else:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        stale = (shards | ({WHOLE} if whole.is_file() else set())) - set(listed)
    for name in stale:
        (folder / name).unlink()
    return sorted(stale)


def wrong_tensors(
    adapter_dir: Path, merged_dir: Path, base_dir: Path, base_config: Any
) -> dict[str, Any]:
    """Tensors of a merged folder that are not what the trained model has.

    Fully trained ones must be the adapter's. Embeddings and output head, where the adapter says
    nothing of them, must be the base's: bitsandbytes never quantizes them.

    Returns:
        Name in the merged folder → the right tensor.

    Raises:
        ValueError: a fully trained tensor has no place in the folder.
    """
    from safetensors import safe_open

    places = {name: shard for shard in _shards(merged_dir) for name in _shapes(shard)}
    adapter_file = adapter_dir / ADAPTER_FILE
    if not adapter_file.is_file():
        return {}  # an old adapter_model.bin: LoRA and weights only, which Axolotl merges
    base = skeleton(base_config)
    ties = _ties(base)
    right: dict[str, Any] = {}
    touched: set[str] = set()
    homeless = []
    with safe_open(adapter_file, framework="pt") as adapter:
        for saved in adapter.keys():  # noqa: SIM118  (safe_open is not a mapping)
            name = saved.removeprefix(PREFIX)
            if ".lora_" in name:
                touched.add(name.split(".lora_")[0] + ".weight")
                continue
            homes = [each for each in ties.get(name, {name}) if each in places]
            if not homes:
                homeless.append(name)
            for home in homes:
                touched.add(home)
                tensor = adapter.get_tensor(saved)
                if not _holds(places[home], home, tensor):
                    right[home] = tensor
    if homeless:
        raise ValueError(
            f"the merge lost {len(homeless)} trained tensors ({', '.join(sorted(homeless)[:3])}): "
            f"{merged_dir} has none of these names. Merge with merge_method: legacy"
        )
    originals = {name: shard for shard in _shards(base_dir) for name in _shapes(shard)}
    for name in (_tables(base) & places.keys() & originals.keys()) - touched:
        with safe_open(originals[name], framework="pt") as shard:
            tensor = shard.get_tensor(name)
        if not _holds(places[name], name, tensor):
            right[name] = tensor
    return right


def write_tensors(merged_dir: Path, tensors: Mapping[str, Any]) -> None:
    """Replace tensors in the merged folder's shards, keeping each shard's dtype and metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for shard in _shards(merged_dir):
        ours = _shapes(shard).keys() & tensors.keys()
        if not ours:
            continue
        with safe_open(shard, framework="pt") as merged:
            metadata = merged.metadata()
        held = load_file(shard)
        held.update({name: tensors[name].to(held[name].dtype) for name in ours})
        partial = shard.with_suffix(".partial")
        save_file(held, partial, metadata=metadata)
        partial.replace(shard)


def _ties(base: Any) -> dict[str, set[str]]:
    """Name → every name of the same parameter, for parameters that have several."""
    groups: dict[int, set[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False) if base else ():
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def _tables(base: Any) -> set[str]:
    """Names of the embedding and output weights."""
    if base is None:
        return set()
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    return {
        f"{name}.weight"
        for name, module in base.named_modules()
        if any(module is table for table in tables)
    }


def _holds(shard: Path, name: str, tensor: Any) -> bool:
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as merged:
        held = merged.get_tensor(name)
    return held.shape == tensor.shape and bool((tensor.to(held.dtype) == held).all())


def _raise_limits(folder: Path, original: int, target: int) -> list[str]:
    """Raise limits that repeat the old context, or generation would stop where the base's did."""
    notes = []
    for file, key in (("generation_config.json", "max_length"), ("tokenizer_config.json", None)):
        path = folder / file
        if not path.is_file():
            continue
        key = key or "model_max_length"
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get(key) == original != target:
            _write_json(path, {**content, key: target})
            notes.append(f"{file} has {key}: {target}")
    return notes


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _shapes_in_file(adapter_dir: Path) -> dict[str, tuple[int, ...]]:
    if (adapter_dir / ADAPTER_FILE).is_file():
        return _shapes(adapter_dir / ADAPTER_FILE)
    from longlora_plugin.masters import read

    return {name: tuple(tensor.shape) for name, tensor in read(adapter_dir).items()}


def _readable(shard: Path) -> bool:
    from safetensors import SafetensorError

    try:
        _shapes(shard)
    except SafetensorError:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    partial.replace(path)
