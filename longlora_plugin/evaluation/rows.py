"""Rows of `eval --json`, `passkey --json` and `bench --json`."""

from __future__ import annotations

from typing import Any, TypedDict


class Measured(TypedDict):
    """What every row says.

    Attributes:
        model: `base`, `base+rope`, `adapter`, `trained`, `merged`, or a name given with `--model`.
        length: context length in tokens.
        weights, tokenizer: folders or names on the hub.
        adapter: folder of the adapter; null without one.
        quantized_bits: 4 or 8; null where the weights are not quantized.
        rope_parameters: RoPE of the model while it was measured.
        attention: `full`, always.
        dtype, device: what it was computed in and on.
        processes: how many computed it.
        seconds: time it took.
        settings: digest of everything that decides the figures; a row with the same one is kept.
    """

    model: str
    length: int
    weights: str
    adapter: str | None
    tokenizer: str
    quantized_bits: int | None
    rope_parameters: dict[str, Any]
    attention: str
    dtype: str
    device: str
    processes: int
    seconds: float
    settings: str


class PerplexityFigures(TypedDict):
    """What `eval` measures.

    Attributes:
        perplexity, nll: exp of the mean loss, and that loss in nats; null where it is not finite.
        bits_per_byte, nll_per_character: the same by the text, which compare between tokenizers.
        ci95: [low, high], bootstrap interval of the perplexity; null for a single window.
        ci_over: what was resampled, `documents` or `windows`.
        tokens, windows, documents: how many were scored.
        score, stride: as asked for.
        buckets: perplexity by position: `from`, `to`, `perplexity`, `tokens` of each bucket.
        bucket_scored: what a bucket averages over, in words.
        data, data_digest: the text as asked for, and a digest of its tokens.
        base_context, target_context: tokens the base handles, and those the recipe extends it to.
    """

    perplexity: float | None
    nll: float | None
    bits_per_byte: float | None
    nll_per_character: float | None
    ci95: list[float] | None
    ci_over: str | None
    tokens: int
    windows: int
    documents: int
    score: str
    stride: int
    buckets: list[dict[str, float | int | None]]
    bucket_scored: str
    data: str
    data_digest: str
    base_context: int
    target_context: int


class PasskeyFigures(TypedDict):
    """What `passkey` measures.

    Attributes:
        accuracy: `correct` / `trials`.
        correct, trials: answers that were right, and all of them.
        ci95: [low, high], Wilson's interval of the accuracy.
        chance: accuracy of guessing.
        seed: as asked for.
        tokens_least, tokens_most: of a prompt with its answer.
        answers: `depth`, `tokens` and `right` of each trial.
    """

    accuracy: float
    correct: int
    trials: int
    ci95: list[float]
    chance: float
    seed: int
    tokens_least: int
    tokens_most: int
    answers: list[dict[str, Any]]


class BenchScores(TypedDict):
    """What `bench` has of lm-eval.

    Attributes:
        score, stderr: lm-eval's, 0 to 1; the error is null where there is a single example.
        metric, filter: lm-eval's names of what the score is.
        metrics: everything that lm-eval gives, by `metric,filter`.
        examples: how many were scored.
        limit, chat_template: as asked for.
        lm_eval: its version.
    """

    score: float
    stderr: float | None
    metric: str
    filter: str
    metrics: dict[str, float]
    examples: int
    limit: int | None
    chat_template: bool
    lm_eval: str


class BenchFigures(BenchScores):
    """What `bench` measures.

    Attributes:
        truncated: prompts that were cut to the length.
        beyond_length: prompts that do not fit into it with their answer.
        longest_prompt, max_gen_toks, max_length: tokens: of a prompt, an answer, and the limit.
    """

    truncated: int
    beyond_length: int
    longest_prompt: int
    max_gen_toks: int
    max_length: int


class PerplexityRow(PerplexityFigures, Measured):
    """A row of `eval`: one model at one length."""


class PasskeyRow(PasskeyFigures, Measured):
    """A row of `passkey`: one model at one length and depth.

    Attributes:
        depth: share of the text before the number, or `random`.
    """

    depth: float | str


class BenchRow(BenchFigures, Measured):
    """A row of `bench`: one model, task and length.

    Attributes:
        task: lm-eval's name of it.
    """

    task: str
