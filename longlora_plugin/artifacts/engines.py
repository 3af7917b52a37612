"""How inference engines read what is saved here: what serves it right, what is lost and why.

Verdicts come from `engines.json`, which `make test-engines` measures in the engines themselves, or,
for engines that cannot run there, from their source code; each row says which.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longlora_plugin.artifacts.manifest import read_manifest
from longlora_plugin.checkpoints.files import read_json

Verdict = Literal["equal", "different", "refused", "not tried"]
ROPE_KEYS = ("rope_parameters", "max_position_embeddings")
MATRIX = Path(__file__).with_name("engines.json")


@dataclass(frozen=True)
class Engine:
    """One inference engine.

    Attributes:
        name: as users write it.
        command: what serves a merged folder; `{folder}` and `{context}` are filled in.
        adapter_command: what serves any adapter; None where the merged folder is the only way.
        lora_command: what serves an adapter of LoRA alone; `{rope}` is the RoPE as JSON.
        reads: spelling of RoPE that it needs: `new` (`rope_parameters`), `old` (`rope_scaling`), or
            `either`.
        measured_as: engine of the matrix that reads the file for it; None where its verdicts were
            read in its source.
        version: version whose source was read; None where the matrix has it.
        refuses: RoPE types that its source refuses, with the reason.
        ignores_scaling: model types whose class there takes θ alone, as its source was read; for
            what the matrix has no row of.
        note: what to know in any case.
    """

    name: str
    command: str
    adapter_command: str | None = None
    lora_command: str | None = None
    reads: Literal["new", "old", "either"] = "either"
    measured_as: str | None = None
    version: str | None = None
    refuses: Mapping[str, str] | None = None
    ignores_scaling: frozenset[str] = frozenset()
    note: str = ""


_MLX_TAKES_THETA_ALONE = """
cohere cohere2 dbrx gemma gemma2 gemma3n_text glm glm4 glm4_moe gpt_neox helium lfm2 lfm2_moe
llama4_text minimax mixtral olmo phi qwen2_moe qwen3_moe recurrent_gemma stablelm starcoder2"""
_GGUF = "python convert_hf_to_gguf.py {folder} --outfile model.gguf"
ENGINES = (
    Engine(
        "transformers-5",
        'AutoModelForCausalLM.from_pretrained("{folder}")',
        adapter_command='longlora_plugin.load_model("{folder}")',
        measured_as="transformers-5",
    ),
    Engine(
        "transformers-4",
        'AutoModelForCausalLM.from_pretrained("{folder}")',
        adapter_command='PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}", '
        'config=AutoConfig.from_pretrained("{folder}")), "{folder}")',
        reads="old",
        measured_as="transformers-4",
    ),
    Engine(
        "vllm",
        "vllm serve {folder} --max-model-len {context}",
        lora_command="vllm serve {base} --enable-lora --lora-modules {name}={folder} "
        "--hf-overrides '{rope}' --max-model-len {context}",
        measured_as="vllm",
        note="without --max-model-len it takes another limit: factor times the maximum for linear, "
        "the original context for longrope",
    ),
    Engine(
        "sglang",
        "python -m sglang.launch_server --model-path {folder} --context-length {context}",
        version="0.5.23",
        refuses={},
        note="without --context-length it multiplies the maximum by the factor of linear",
    ),
    Engine(
        "llama.cpp",
        f"{_GGUF} && llama-server -m model.gguf -c {{context}}",
        measured_as="llama.cpp",
    ),
    Engine(
        "ollama",
        f"{_GGUF} && printf 'FROM ./model.gguf\\nPARAMETER num_ctx {{context}}\\n' > Modelfile && "
        "ollama create {name} -f Modelfile",
        measured_as="llama.cpp",
        note="its own import of safetensors reads neither spelling for most families: go through "
        "GGUF",
    ),
    Engine(
        "mlx-lm",
        "mlx_lm.server --model {folder}",
        reads="old",
        measured_as="mlx-lm",
        ignores_scaling=frozenset(_MLX_TAKES_THETA_ALONE.split()),
    ),
    Engine(
        "exllamav3",
        "python convert.py -i {folder} -o {name}-exl3 -w work -b 4 && max_seq_len: {context} in "
        "TabbyAPI's config.yml",
        version="1.6.5",
        refuses={"dynamic": "its RoPE class raises ValueError"},
    ),
    Engine(
        "lmdeploy",
        "lmdeploy serve api_server {folder} --session-len {context}",
        version="0.18",
        refuses={},
    ),
)


@dataclass(frozen=True)
class Saved:
    """What a saved folder holds, as far as engines ask.

    Attributes:
        folder: of an adapter or a whole model.
        is_adapter: whether it is an adapter.
        base_model: the base model of an adapter.
        trains_more: whether an adapter has fully trained modules (embeddings, norms).
        model_type, rope_type, context: of its config.json; `context` in tokens.
        rope_fields: RoPE fields of its config.json, in the new spelling.
        has_old, has_new: which spellings of RoPE its config.json has.
        tokenizer_class: of its tokenizer_config.json.
    """

    folder: Path
    is_adapter: bool
    base_model: str
    trains_more: bool
    model_type: str
    rope_type: str
    context: int
    rope_fields: dict[str, Any]
    has_old: bool
    has_new: bool
    tokenizer_class: str | None


@dataclass(frozen=True)
class EngineRow:
    """One engine's verdict on one folder.

    Attributes:
        engine: its name.
        verdict: `equal`: it computes what transformers 5 does; `different`: it computes something
            else without an error; `refused`: it does not load the folder; `not tried`.
        reason: why, or what to know.
        basis: where the verdict comes from, with the version.
        command: what serves it right; None where nothing does.
        inside, beyond: with `--run`, perplexity over transformers 5's up to and beyond the base
            model's context.
    """

    engine: str
    verdict: Verdict
    reason: str
    basis: str
    command: str | None
    inside: float | None = None
    beyond: float | None = None


def describe(folder: Path) -> Saved:
    """Read what a folder of a run holds.

    Raises:
        ValueError: it holds neither an adapter nor a model, or its config.json is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give what training or merging wrote")
    config_file = folder / "config.json"
    adapter_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise ValueError(
            f"{folder} has no config.json; give the folder that training or merging wrote"
        )
    config = read_json(config_file)
    text = {**config, **(config.get("text_config") or {})}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        rope = rope.get("full_attention") or {}
    adapter = read_json(adapter_file) if adapter_file.is_file() else {}
    manifest = read_manifest(folder)
    tokenizer = folder / "tokenizer_config.json"
    return Saved(
        folder=folder,
        is_adapter=bool(adapter),
        base_model=str(adapter.get("base_model_name_or_path") or ""),
        trains_more=bool(adapter.get("modules_to_save")),
        model_type=str(text.get("model_type") or ""),
        rope_type=str(rope.get("rope_type") or rope.get("type") or "default"),
        context=manifest.target_context if manifest else _maximum_of(text, config_file),
        rope_fields={key: text[key] for key in ROPE_KEYS if key in text},
        has_old="rope_theta" in text or "rope_scaling" in text,
        has_new="rope_parameters" in text,
        tokenizer_class=read_json(tokenizer).get("tokenizer_class")
        if tokenizer.is_file()
        else None,
    )


def _maximum_of(text: Mapping[str, Any], path: Path) -> int:
    maximum = text.get("max_position_embeddings")
    if type(maximum) is not int or maximum < 1:
        raise ValueError(
            f"{path}: got max_position_embeddings: {maximum!r}; write the model's context, a whole "
            "number of tokens"
        )
    return maximum


def judge(engine: Engine, saved: Saved) -> EngineRow:
    """What an engine makes of a folder, without running it."""
    names = {
        "folder": saved.folder,
        "context": saved.context,
        "base": saved.base_model,
        "name": saved.folder.resolve().name,
        "rope": json.dumps(saved.rope_fields),
    }
    basis = f"read in the source of {engine.version}" if engine.version else "measured"
    template: str | None = engine.command
    if saved.is_adapter:
        template = engine.adapter_command or (None if saved.trains_more else engine.lora_command)
    if template is None:
        return _adapter_row(engine, saved, basis)
    command = template.format(**names)
    fault = _spelling_fault(engine, saved)
    if fault:
        return EngineRow(engine.name, "different", fault, "read in config.json", None)
    if engine.measured_as == "transformers-4" and saved.tokenizer_class == "TokenizersBackend":
        reason = "its tokenizer class TokenizersBackend exists in transformers 5 only"
        return EngineRow(engine.name, "refused", reason, "read in tokenizer_config.json", None)
    if engine.measured_as is None:
        refusal = (engine.refuses or {}).get(saved.rope_type)
        if refusal:
            return EngineRow(engine.name, "refused", refusal, basis, None)
        return EngineRow(engine.name, "not tried", engine.note or "reads it", basis, command)
    return _measured_row(engine, saved, command)


def _adapter_row(engine: Engine, saved: Saved, basis: str) -> EngineRow:
    merged = saved.folder / "merged"
    where = f"serve {merged}" if merged.is_dir() else "axolotl merge-lora recipe.yml"
    what = "trained embeddings and norms" if saved.trains_more else "the new RoPE"
    reason = f"it does not take {what} from an adapter: {where}"
    return EngineRow(engine.name, "refused", reason, basis, None)


def _spelling_fault(engine: Engine, saved: Saved) -> str | None:
    if saved.rope_type == "default":
        return None
    if engine.reads == "old" and not saved.has_old:
        return (
            "config.json has rope_parameters only, which it does not read: the extended context is "
            "lost without an error. Save or merge again with this version"
        )
    if engine.reads == "new" and not saved.has_new:
        return "config.json has no rope_parameters"
    return None


def _measured_row(engine: Engine, saved: Saved, command: str) -> EngineRow:
    if engine.measured_as == "transformers-5":
        return EngineRow(engine.name, "equal", engine.note, "the reference", command)
    # A preset that changes θ alone leaves the type as it was.
    rope = "theta" if saved.rope_type == "default" else saved.rope_type
    own = _row_of(engine, saved.model_type, rope)
    if own is None and rope != "theta" and saved.model_type in engine.ignores_scaling:
        reason = f"its class for {saved.model_type} takes θ alone: the scaling is lost, no error"
        return EngineRow(engine.name, "different", reason, "read in its source", None)
    found = own or _row_of(engine, "llama", rope)
    if found is None:
        reason = f"RoPE type {saved.rope_type} was not tried"
        return EngineRow(engine.name, "not tried", reason, "", command)
    basis = f"measured in {found['version'] or engine.measured_as}"
    if own is None:
        basis += f", for model type llama ({saved.model_type} was not tried)"
    verdict = found["verdict"]
    if verdict == "equal" and own is None:
        reason = "right for model type llama; serve-check --run tries this folder"
        reason += f". {engine.note}" if engine.note else ""
        return EngineRow(engine.name, "not tried", reason, basis, command)
    if verdict == "equal":
        return EngineRow(engine.name, "equal", engine.note, basis, command)
    if verdict == "refused":
        return EngineRow(engine.name, "refused", found["error"], basis, None)
    ratio = found["beyond"]
    what = "no numbers" if ratio is None else f"perplexity {ratio:.3g} times that of transformers 5"
    reason = (
        f"{what} beyond the base model's context, without an error; train with rope: yarn or linear"
    )
    return EngineRow(engine.name, "different", reason, basis, None)


def _row_of(engine: Engine, model_type: str, rope: str) -> dict[str, Any] | None:
    return matrix().get((str(engine.measured_as), model_type, rope))


@functools.cache
def matrix() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(engine, model type, RoPE type) → the measured row."""
    rows = json.loads(MATRIX.read_text(encoding="utf-8"))["rows"]
    return {(row["engine"], row["model_type"], row["rope"]): row for row in rows}
