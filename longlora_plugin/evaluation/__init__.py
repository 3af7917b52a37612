"""Measures of a long context: perplexity by length and position, and retrieval of a hidden number.

Everything here uses the model's own full attention (`model.eval()`), as the paper does: LongLoRA,
arXiv 2309.12307, Table 6, shows what evaluating with S²-Attn would cost.
"""
