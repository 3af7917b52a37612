"""A model's shape, read off the model itself built without weights.

transformers builds the model on the `meta` device from its config alone: every parameter has its
shape and no memory, so the counts are exact for any family (bias or not, tied or not, mixtures of
experts, several norms a layer) without a rule for each. Weights are told apart by where they stand:
under an attention module, in experts, in the output head, or elsewhere in the decoder (the FFN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Values of a config's `layer_types` whose cost depends on which keys a query sees."""


@dataclass(frozen=True)
class ModelShape:
    """What FLOPs and activations depend on. Weights are matrix elements a token meets.

    Attributes:
        hidden: width of the residual stream.
        vocab: rows of the output head.
        layers: decoder layers.
        heads, kv_heads: query and key-value heads of a layer.
        head_dim, value_dim: width of a query/key head and of a value head.
        rotary_dim: part of `head_dim` that RoPE turns.
        windows: for each layer that attends, its sliding window in tokens; None attends fully.
        projection_weights: of all attention projections.
        ffn_weights: of all FFNs; of a mixture, the experts one token is routed to.
        head_weights: of the output head (tied or not, it is multiplied).
        norm_elements: elements normalised for one token.
    """

    hidden: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    windows: tuple[int | None, ...]
    projection_weights: int
    ffn_weights: int
    head_weights: int
    norm_elements: int

    @property
    def ffn_width(self) -> float:
        """Inner width of one layer's FFN, counted as a gated one (three matrices)."""
        return self.ffn_weights / (3 * self.hidden * self.layers)


def meta_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The language model of a transformers config, text only or with vision, without weights.

    Raises:
        ValueError: transformers has no generating model for the config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        remote = trust_remote_code and auto.__name__ in (getattr(config, "auto_map", None) or {})
        if remote or type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(
                    config, attn_implementation="eager", trust_remote_code=trust_remote_code
                )
    raise ValueError(
        f"base_model: transformers has no language model for model_type {config.model_type!r}; "
        "plan needs a decoder that generates text"
    )


def shape_of(model: Any) -> ModelShape:
    """The shape of a model built by `meta_model` (or of any causal language model)."""
    from torch import nn

    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if getattr(text, "qk_nope_head_dim", None):
        head_dim = text.qk_nope_head_dim + text.qk_rope_head_dim
    rotary = getattr(text, "qk_rope_head_dim", None) or int(head_dim * _rotary_share(text))

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    projections = ffn = norms = 0
    for path, module in decoder.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if "norm" in type(module).__name__.lower():
                if name == "weight":
                    per_head = parameter.numel() == head_dim
                    norms += parameter.numel() * (
                        _heads_of(path, heads, kv_heads) if per_head else 1
                    )
            elif parameter.ndim < 2 or isinstance(module, nn.Embedding) or module is head:
                continue
            elif "attn" in path or "attention" in path:
                projections += parameter.numel()
            elif "experts" in path.split("."):
                ffn += parameter.numel() * _routed_share(text)
            else:
                ffn += parameter.numel()
    return ModelShape(
        hidden=text.hidden_size,
        vocab=head.weight.shape[0],
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=getattr(text, "v_head_dim", None) or head_dim,
        rotary_dim=rotary,
        windows=_windows(text),
        projection_weights=projections,
        ffn_weights=round(ffn),
        head_weights=head.weight.numel(),
        norm_elements=norms,
    )


def _rotary_share(text: Any) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor")
    return float(share or getattr(text, "partial_rotary_factor", None) or 1.0)


def _heads_of(path: str, heads: int, kv_heads: int) -> int:
    # A query or key norm that is one head wide runs once a head.
    name = path.rsplit(".", 1)[-1]
    return heads if name.startswith("q_") else kv_heads if name.startswith("k_") else 1


def _routed_share(text: Any) -> float:
    experts = next(
        getattr(text, key)
        for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        if getattr(text, key, None)
    )
    routed = next(
        getattr(text, key)
        for key in ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk")
        if getattr(text, key, None)
    )
    return routed / experts


def _windows(text: Any) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return (window,) * text.num_hidden_layers
    narrow = {
        "sliding_attention": window,
        "chunked_attention": getattr(text, "attention_chunk_size", None),
    }
    return tuple(narrow.get(kind) for kind in kinds if kind in ATTENDING)
