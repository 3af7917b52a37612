"""transformers' names of attention implementations that S²-Attn can serve. Loads no torch."""

from __future__ import annotations

SUPPORTED = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "a flash-attn kernel of the hub (kernels-community/flash-attn2, …)",
)


def kernel_kind(implementation: str | None) -> str:
    """`sdpa`, `eager`, `flex` or `flash`: what computes S²-Attn in place of `implementation`.

    Raises:
        ValueError: S²-Attn has no such back end; names the supported ones.
    """
    name = (implementation or "").split("@")[0]
    if name in ("flash_attention_2", "flash_attention_3", "flash_attention_4") or (
        "/" in name and "flash" in name and "|" not in name
    ):
        return "flash"
    if implementation in ("sdpa", "eager", "flex_attention"):
        return implementation.removesuffix("_attention")
    raise ValueError(
        f"shifted attention does not support attn_implementation: {implementation}; "
        f"write one of {', '.join(SUPPORTED)}, or longlora: {{shifted_attention: false}}"
    )
