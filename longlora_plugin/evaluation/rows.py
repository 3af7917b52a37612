"""Rows of `eval --json`, `passkey --json` and `bench --json`: every key, its type and meaning."""

from typing import Annotated as Key
from typing import Any, TypedDict


class Measured(TypedDict):
    """What every row says."""

    model: Key[str, "`base`, `base+rope`, `adapter`, `trained`, `merged`, or a name from `--model`"]
    length: Key[int, "context length in tokens"]
    weights: Key[str, "folder or name on the hub"]
    adapter: Key[str | None, "its folder; null without one"]
    tokenizer: Key[str, "folder or name on the hub"]
    quantized_bits: Key[int | None, "4 or 8; null where the weights are not quantized"]
    rope_parameters: Key[dict[str, Any], "RoPE of the model while it was measured"]
    attention: Key[str, "`full`, always"]
    dtype: Key[str, "what it was computed in"]
    device: Key[str, "what it was computed on"]
    processes: Key[int, "how many computed it"]
    seconds: Key[float, "time it took"]
    settings: Key[str, "digest of all that decides the figures; a row with the same one is kept"]


class PerplexityFigures(TypedDict):
    """What `eval` measures."""

    perplexity: Key[float | None, "exp(`nll`); null where that is not finite"]
    nll: Key[float | None, "mean loss of a token in nats"]
    bits_per_byte: Key[float | None, "the loss by the text, which compares between tokenizers"]
    nll_per_character: Key[float | None, "the same in nats"]
    ci95: Key[list[float] | None, "bootstrap interval of the perplexity; null for a single window"]
    ci_over: Key[str | None, "what was resampled, `documents` or `windows`"]
    tokens: Key[int, "how many were scored"]
    windows: Key[int, "how many were read"]
    documents: Key[int, "how many they are of"]
    score: Key[str, "`new` or `all`, as asked for"]
    stride: Key[int, "tokens a window moves by"]
    buckets: Key[list[dict[str, Any]], "by position: `from`, `to`, `perplexity`, `tokens` of each"]
    bucket_scored: Key[str, "what a bucket averages over, in words"]
    data: Key[str, "the text as asked for"]
    data_digest: Key[str, "digest of its tokens"]
    base_context: Key[int, "tokens the base model handles as it is"]
    target_context: Key[int, "tokens it was extended to"]


class PasskeyFigures(TypedDict):
    """What `passkey` measures."""

    accuracy: Key[float, "`correct` / `trials`"]
    correct: Key[int, "answers that were right"]
    trials: Key[int, "answers"]
    ci95: Key[list[float], "Wilson's interval of the accuracy"]
    chance: Key[float, "accuracy of guessing"]
    seed: Key[int, "as asked for"]
    tokens_least: Key[int, "of the shortest prompt with its answer"]
    tokens_most: Key[int, "of the longest"]
    answers: Key[list[dict[str, Any]], "`depth`, `tokens` and `right` of each trial"]


class BenchScores(TypedDict):
    """What `bench` has of lm-eval."""

    score: Key[float, "lm-eval's, 0 to 1"]
    stderr: Key[float | None, "its standard error; null for a single example"]
    metric: Key[str, "lm-eval's name of what the score is"]
    filter: Key[str, "lm-eval's name of how the answer was read"]
    metrics: Key[dict[str, float], "everything that lm-eval gives, by `metric,filter`"]
    examples: Key[int, "how many were scored"]
    limit: Key[int | None, "as asked for"]
    chat_template: Key[bool, "as asked for"]
    lm_eval: Key[str, "its version"]


class BenchFigures(BenchScores):
    """What `bench` measures."""

    truncated: Key[int, "prompts that were cut to the length"]
    beyond_length: Key[int, "prompts that do not fit into it with their answer"]
    longest_prompt: Key[int, "its tokens"]
    max_gen_toks: Key[int, "tokens of an answer, at most"]
    max_length: Key[int, "tokens that the model was given, at most"]


class PerplexityRow(PerplexityFigures, Measured):
    """A row of `eval`: one model at one length."""


class PasskeyRow(PasskeyFigures, Measured):
    """A row of `passkey`: one model at one length and depth."""

    depth: Key[float | str, "share of the text before the number, or `random`"]


class BenchRow(BenchFigures, Measured):
    """A row of `bench`: one model, task and length."""

    task: Key[str, "lm-eval's name of it"]
