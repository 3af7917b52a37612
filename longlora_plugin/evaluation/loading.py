"""A model described, and loaded: folders or names of weights, adapter and tokenizer.

Descriptions are enough to find out which rows of a results file are still missing; models are
loaded one at a time.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from longlora_plugin.artifacts.load import put_on
from longlora_plugin.checkpoints.files import ADAPTER_CONFIG, read_json, weight_files


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured, in evaluation mode.

    Attributes:
        model: a transformers causal language model, plain or wrapped by PEFT.
        tokenizer: the one it was trained with.
        device: where its input goes.
    """

    source: ModelSource
    model: Any
    tokenizer: Any
    device: Any
    dtype: Any

    def check_ids(self, largest: int) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            ValueError: says how many embeddings there are.
        """
        rows = self.model.get_input_embeddings().weight.shape[0]
        if largest >= rows:
            raise ValueError(
                f"{self.source.label}: its tokenizer ({self.source.tokenizer}) gives token "
                f"{largest}, but the model has {rows} embeddings; the tokenizer is not the model's"
            )


@dataclass(frozen=True)
class ModelSource:
    """A model to load.

    Attributes:
        label: what results call it.
        weights: folder or hub name of the weights.
        config: transformers config to build it with.
        tokenizer: folder or hub name of its tokenizer.
        adapter: folder of a PEFT adapter to put on it.
        quantization: options of `BitsAndBytesConfig`; empty for none.
        load_options: further options of `from_pretrained`.
        notes: what a user should know of it.
    """

    label: str
    weights: str
    config: Any
    tokenizer: str
    adapter: Path | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    load_options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def load(self, device: Any, dtype: Any) -> LoadedModel:
        """The model in evaluation mode, with the attention that transformers takes by default.

        That is PyTorch's own (sdpa) where the family has it; gpt-oss, for one, has not.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        options = dict(self.load_options)
        if self.quantization:
            options["quantization_config"] = _bitsandbytes(self.quantization, dtype)
            options.setdefault("device_map", {"": device})
        config = copy.deepcopy(self.config)
        config._attn_implementation = None
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.weights, config=config, dtype=dtype, **options
            )
        except (RuntimeError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{self.label}: cannot load {self.weights}: {error}") from error
        if self.adapter is not None:
            model = put_on(model, self.adapter)
        if "device_map" not in options:
            model = model.to(device)
        where = model.get_input_embeddings().weight.device
        return LoadedModel(self, model.eval(), self.load_tokenizer(), where, dtype)

    def load_tokenizer(self) -> Any:
        """The tokenizer, loaded once in a process."""
        return _tokenizer(self.tokenizer, self.load_options.get("trust_remote_code", False))

    @property
    def rope(self) -> dict[str, Any]:
        """The `rope_parameters` it runs with."""
        return dict(getattr(self.config.get_text_config(), "rope_parameters", None) or {})

    def identity(self) -> dict[str, Any]:
        """What tells this model from another: weights, adapter, config and quantization."""
        adapter = None
        if self.adapter is not None:
            adapter = [
                _fingerprint(str(self.adapter), None),
                read_json(self.adapter / ADAPTER_CONFIG),
            ]
        config = self.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        return {
            "weights": _fingerprint(self.weights, self.config),
            "adapter": adapter,
            "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
            "quantization": self.quantization,
        }

    def description(self) -> dict[str, Any]:
        """What a row says of the model."""
        bits = next((n for n in (4, 8) if self.quantization.get(f"load_in_{n}bit")), None)
        return {
            "weights": self.weights,
            "adapter": None if self.adapter is None else str(self.adapter),
            "tokenizer": self.tokenizer,
            "quantized_bits": bits,
            "rope_parameters": self.rope,
        }


def same_tokenizer(left: Any, right: Any) -> bool:
    """Whether two tokenizers turn every text into the same tokens."""
    if left is right:
        return True
    ours, theirs = (getattr(each, "backend_tokenizer", None) for each in (left, right))
    if ours is not None and theirs is not None:
        return bool(ours.to_str() == theirs.to_str())
    return bool(left.get_vocab() == right.get_vocab())


def _bitsandbytes(options: dict[str, Any], dtype: Any) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "the recipe's base model is quantized, and bitsandbytes is not installed: pip install "
            "bitsandbytes, or write --unquantized"
        )
    if options.get("load_in_4bit"):
        options = {"bnb_4bit_compute_dtype": dtype, **options}
    return BitsAndBytesConfig(**options)


@cache
def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"cannot read a tokenizer from {name!r}: {error}") from None


def _fingerprint(name: str, config: Any) -> str:
    """A folder by the sizes and times of its weights, a hub model by name and commit."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None)}"
    sha = hashlib.sha256()
    for file in weight_files(folder):
        status = file.stat()
        sha.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]
