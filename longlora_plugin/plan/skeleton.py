"""The common decoder as names and shapes of weights, without torch and transformers.

Same module names and weights as transformers' Llama, Mistral, Qwen2 and Qwen3, and as much of
`torch.nn.Module` as counting asks for, so that everything that counts on a built model counts the
same here (a test compares the two).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longlora_plugin.run.base_model import PlainConfig


class Weight:
    """A parameter without numbers."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.ndim = len(shape)

    def numel(self) -> int:
        return math.prod(self.shape)


class Module:
    """Named modules and weights, in the order they are given."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        yield from ((name, each) for name, each in vars(self).items() if isinstance(each, Module))

    def children(self) -> Iterator[Module]:
        yield from (module for _, module in self.named_children())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        yield prefix, self
        for name, module in self.named_children():
            yield from module.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Module]:
        yield from (module for _, module in self.named_modules())

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Weight]]:
        seen = set()
        for prefix, module in self.named_modules() if recurse else [("", self)]:
            for name, each in vars(module).items():
                if isinstance(each, Weight) and id(each) not in seen:
                    seen.add(id(each))
                    yield (f"{prefix}.{name}" if prefix else name), each

    def parameters(self) -> Iterator[Weight]:
        yield from (weight for _, weight in self.named_parameters())


class Linear(Module):
    """Weight [outputs, inputs] and, where it has one, bias."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(weight=Weight(outputs, inputs))
        if bias:
            self.bias = Weight(outputs)


class Embedding(Module):
    """Weight [rows, width]."""


class RMSNorm(Module):
    """Weight [width]."""


class ModuleList(Module):
    """Modules named by their number."""

    def __len__(self) -> int:
        return len(vars(self))

    def __iter__(self) -> Iterator[Module]:
        yield from self.children()


class Skeleton(Module):
    """A causal language model that has weights' shapes and nothing else.

    S² covers every layer of it.
    """

    def __init__(self, config: PlainConfig) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        super().__init__(
            config=config,
            model=Module(
                embed_tokens=Embedding(weight=Weight(vocab, hidden)),
                layers=ModuleList(
                    **{str(index): _layer(config) for index in range(config.num_hidden_layers)}
                ),
                norm=RMSNorm(weight=Weight(hidden)),
            ),
            lm_head=Linear(hidden, vocab),
        )
        if getattr(config, "tie_word_embeddings", False):
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_decoder(self) -> Any:
        return self.model

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head


def _layer(config: PlainConfig) -> Module:
    hidden, inner, family = config.hidden_size, config.intermediate_size, config.model_type
    head_dim = getattr(config, "head_dim", hidden // config.num_attention_heads)
    queries, keys = (n * head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    bias = family in ("llama", "qwen3") and bool(getattr(config, "attention_bias", False))
    inputs_bias = bias or family == "qwen2"
    normed = ("q_norm", "k_norm") if family == "qwen3" else ()
    attention = Module(
        q_proj=Linear(hidden, queries, inputs_bias),
        k_proj=Linear(hidden, keys, inputs_bias),
        v_proj=Linear(hidden, keys, inputs_bias),
        o_proj=Linear(queries, hidden, bias),
        **{name: RMSNorm(weight=Weight(head_dim)) for name in normed},
    )
    bias = family == "llama" and bool(getattr(config, "mlp_bias", False))
    ffn = {name: Linear(hidden, inner, bias) for name in ("gate_proj", "up_proj")}
    return Module(
        self_attn=attention,
        mlp=Module(**ffn, down_proj=Linear(inner, hidden, bias)),
        input_layernorm=RMSNorm(weight=Weight(hidden)),
        post_attention_layernorm=RMSNorm(weight=Weight(hidden)),
    )
