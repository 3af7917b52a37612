"""A model's shape, read off the model itself built without weights.

transformers builds the model on the `meta` device from its config alone: every parameter has its
shape and no memory, so the counts are exact for any family (bias or not, tied or not, mixtures of
experts, several norms a layer) without a rule for each. Weights are told apart by where they are:
under an attention module, in experts, in the output head, or elsewhere in the decoder (the FFN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longlora_plugin.attention.vocabulary import layer_windows
from longlora_plugin.plan.parameters import is_kind
from longlora_plugin.run.base_model import PlainConfig


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
        windows: for each layer that attends, how many keys a query sees; None attends fully.
        unshifted: how many of the layers that attend fully S² cannot cover.
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
    unshifted: int = 0

    @property
    def full_layers(self) -> int:
        """Layers that attend to the whole document."""
        return self.windows.count(None)

    @property
    def ffn_width(self) -> float:
        """Inner width of one layer's FFN, counted as a gated one (three matrices)."""
        return self.ffn_weights / (3 * self.hidden * self.layers)


def meta_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The language model of a transformers config, text only or with vision, without weights.

    Raises:
        ValueError: transformers has no generating model for the config.
    """
    if isinstance(config, PlainConfig):
        from longlora_plugin.plan.skeleton import Skeleton

        return Skeleton(config)
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        remote = trust_remote_code and auto.__name__ in (getattr(config, "auto_map", None) or {})
        if remote or type(config) in auto._model_mapping:
            try:
                with torch.device("meta"):
                    return auto.from_config(
                        config, attn_implementation="eager", trust_remote_code=trust_remote_code
                    )
            except (TypeError, RuntimeError, ArithmeticError) as error:
                raise ValueError(f"base_model: its config builds no model: {error}") from error
    raise ValueError(
        f"base_model: transformers has no language model for model_type {config.model_type!r}; "
        "plan needs a decoder that generates text"
    )


def shape_of(model: Any) -> ModelShape:
    """The shape of a model built by `meta_model` (or of any causal language model)."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if getattr(text, "qk_nope_head_dim", None):
        head_dim = text.qk_nope_head_dim + text.qk_rope_head_dim
    rotary = getattr(text, "qk_rope_head_dim", None) or int(head_dim * _rotary_share(text))

    windows = layer_windows(text)
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
            elif parameter.ndim < 2 or is_kind(module, "Embedding") or module is head:
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
        windows=windows,
        unshifted=_unshifted(model, windows.count(None)),
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
    text = getattr(text, "ffn_config", None) or text  # DBRX
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


def _unshifted(model: Any, full_layers: int) -> int:
    """How many of the fully attending layers S² cannot cover, judged on the built model."""
    if isinstance(model.config, PlainConfig):
        return 0
    from longlora_plugin.attention.eligibility import attention_layers, eligible_layers

    covered, _ = eligible_layers(model)
    if not covered:
        return full_layers
    decoder = set(model.get_decoder().modules())
    others = [m for m in attention_layers(model) if m in decoder and m not in covered]
    windows = layer_windows(model.config.get_text_config())
    return max(0, len(others) - (len(windows) - full_layers))
