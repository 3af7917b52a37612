"""The model card (`README.md`) of an adapter, a checkpoint, a merged or a fully fine-tuned model.

PEFT, transformers and Axolotl write cards of their own ("trained from scratch", a template of empty
sections, the base model's card); this one takes their place and keeps their metadata. What a user
writes outside of its markers stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from longlora_plugin.artifacts.engines import ENGINES, describe, judge
from longlora_plugin.artifacts.manifest import FILE, Manifest
from longlora_plugin.checkpoints.files import write_text

Kind = Literal["adapter", "model", "merged"]
BEGIN, END = "<!-- longlora: begin -->", "<!-- longlora: end -->"
TAGS = ("longlora", "long-context")
KEPT = ("license", "license_name", "license_link", "language")
"""Metadata of the base model's card that also holds for what was made from it."""

SPARSE = {"s2": "shifted sparse attention", "pose": "attention inside groups whose positions skip"}
"""Attention pattern → what a card calls it."""


def write_card(folder: Path, manifest: Manifest, kind: Kind, *, called: Path | None = None) -> None:
    """Write or bring up to date the model card of a folder.

    Args:
        folder: of the adapter or model; `README.md` in it is replaced, except for text outside of
            the markers of an earlier card of this package.
        kind: `adapter` (also a checkpoint's), `model` (fully fine-tuned) or `merged`.
        called: what the folder will be called, where it has another name for now.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    earlier = ModelCard(text, ignore_metadata_errors=True) if text.startswith("---") else None
    data = earlier.data.to_dict() if earlier else {}
    before, after = "", ""
    if BEGIN in text and END in text:
        content = earlier.text if earlier else text
        before, after = content.split(BEGIN)[0].strip(), content.split(END)[-1].strip()
    elif kind == "merged":
        data = {key: value for key, value in data.items() if key in KEPT}
    body = "\n".join(_body(folder, called or folder, manifest, kind))
    parts = (before, f"{BEGIN}\n{body}\n{END}", after)
    card = ModelCard(
        f"---\n{_metadata(data, manifest, kind)}\n---\n\n"
        + "\n\n".join(part for part in parts if part)
        + "\n",
        ignore_metadata_errors=True,
    )
    write_text(path, str(card))


def _name(folder: Path) -> str:
    folder = folder.resolve()
    inside = folder.name == "merged" or folder.name.startswith("checkpoint-")
    return f"{folder.parent.name}/{folder.name}" if inside else folder.name


def _metadata(data: dict[str, Any], manifest: Manifest, kind: Kind) -> str:
    from huggingface_hub import ModelCardData

    data.pop("model-index", None)
    data.pop("model_name", None)
    is_local = Path(manifest.base_model).exists() or manifest.base_model.startswith((".", "/"))
    if is_local:
        data.pop("base_model", None)  # the hub takes names of its own models only
    else:
        data["base_model"] = manifest.base_model
        data["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    data["library_name"] = "peft" if kind == "adapter" else "transformers"
    data.setdefault("pipeline_tag", "text-generation")
    tags = [tag for tag in data.get("tags") or [] if tag not in ("generated_from_trainer", *TAGS)]
    data["tags"] = [*TAGS, *tags]
    return ModelCardData(**data, ignore_metadata_errors=True).to_yaml().strip()


def _body(folder: Path, called: Path, manifest: Manifest, kind: Kind) -> Iterator[str]:
    what = {
        "adapter": "A LoRA adapter for",
        "model": "A fine-tuned version of",
        "merged": "A fine-tuned version (base model and adapter merged) of",
    }[kind]
    yield f"# {_name(called)}\n"
    yield (
        f"{what} `{manifest.base_model}` for a context of {manifest.target_context:,} tokens, "
        f"trained with [LongLoRA](https://arxiv.org/abs/2309.12307). `{FILE}` has every setting.\n"
    )
    yield "| | |\n|---|---|"
    for key, value in _facts(manifest):
        yield f"| {key} | {value} |"
    yield f"\n## Loading\n\n{_loading(called, manifest, kind)}"
    yield "\n## Serving\n"
    yield from _serving(folder, "merged" if kind == "adapter" else called.name, kind)
    if manifest.results:
        yield "\n## Results\n"
        yield from _results(manifest.results)
    if manifest.recipe:
        import yaml

        recipe = yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True).strip()
        yield "\n## Training\n"
        yield f"<details><summary>Axolotl recipe</summary>\n\n```yaml\n{recipe}\n```\n\n</details>"


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    contexts = [
        (manifest.pretrained_context, "pretraining"),
        (manifest.base_context, "base model"),
        (manifest.target_context, "trained for"),
    ]
    yield "context", ", ".join(f"{tokens:,} ({what})" for tokens, what in contexts if tokens)
    reason = f" ({manifest.rope_reason})" if manifest.rope_reason else ""
    parameters = json.dumps(manifest.rope_parameters, sort_keys=True)
    yield "RoPE", f"{manifest.rope_preset}{reason}: `{shorten(parameters, 300, placeholder='…')}`"
    if manifest.group_size:
        yield (
            "training attention",
            f"{SPARSE.get(manifest.attention_pattern or '', 'sparse attention')} "
            f"(`{manifest.attention_pattern}`) in groups of {manifest.group_size:,} tokens, "
            f"{manifest.covered_layers} layers; full attention in the last "
            f"{manifest.full_attention_steps} of {manifest.steps} steps. Evaluation and generation "
            "use the model's own full attention",
        )
    if manifest.adapter:
        kinds = ", ".join(manifest.trainable)
        more = f", {kinds} ({manifest.trained_parameters:,} parameters)" if kinds else ""
        yield "trained", f"LoRA{more}"
    else:
        yield "trained", "all weights"
    if manifest.versions:
        yield "versions", ", ".join(f"{name} {each}" for name, each in manifest.versions.items())


def _loading(folder: Path, manifest: Manifest, kind: Kind) -> str:
    if kind != "adapter":
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder.name}")  # or its name on the '
            f'hub\ntokenizer = AutoTokenizer.from_pretrained("{folder.name}")\n```'
        )
    return (
        "The new RoPE is in this folder's `config.json`; the base model has to be built with it:\n"
        "\n```python\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "from peft import PeftModel\n\n"
        f'adapter = "{folder.name}"  # or its name on the hub\n'
        "config = AutoConfig.from_pretrained(adapter)\n"
        "base = AutoModelForCausalLM.from_pretrained("
        f'"{manifest.base_model}", config=config)\n'
        "model = PeftModel.from_pretrained(base, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n```\n\n"
        "or, with `pip install longlora-plugin`, "
        "`model = longlora_plugin.load_model(adapter)`.\n\n"
        "`AutoPeftModelForCausalLM.from_pretrained`, `PeftModel.from_pretrained` on a base model "
        "loaded without that config, and `AutoModelForCausalLM.from_pretrained` with the adapter's "
        "name use the base model's RoPE: they give no error and lose the extended context "
        "(`longlora extend-base` makes the first one right)."
    )


def _serving(folder: Path, served: str, kind: Kind) -> Iterator[str]:
    """What serves the whole model right, and what does not."""
    if kind == "adapter":
        yield (
            "Inference engines take the merged model (`axolotl merge-lora recipe.yml`); most of "
            "them refuse or ignore trained embeddings and norms of an adapter.\n"
        )
    if (folder / "config.json").is_file():
        whole = replace(describe(folder), is_adapter=False, folder=Path(served))
        rows = [judge(engine, whole) for engine in ENGINES if "transformers" not in engine.name]
        right = [f"# {row.engine}\n{row.command}" for row in rows if row.command]
        yield f"```bash\n{chr(10).join(right)}\n```\n"
        for row in rows:
            if not row.command:
                yield f"Not with {row.engine}: {row.reason}.\n"
    yield "`longlora serve-check` says what each engine was tried with."


def _results(results: list[dict[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in results for key in row))
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for row in results:
        yield f"| {' | '.join(_cell(row, column) for column in columns)} |"


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column, "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
