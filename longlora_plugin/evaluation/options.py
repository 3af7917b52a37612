"""What can be asked of `eval`, `passkey` and `bench`: one field, one option of the command line.

Help texts and defaults are stated here and nowhere else. Light to import, so that `--help` is.
"""

# ruff: noqa: RUF009 - `option` is `dataclasses.field` with a help text

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ScoreMode = Literal["new", "all"]
Depth = float | Literal["random"]


def option(default: Any, help: str, **more: Any) -> Any:
    """A field that is an option.

    Args:
        more: `metavar`; `min` of a number; `repeatable` for a tuple that is given one by one
            and not with commas; `flag`, the option's name where it is not the field's.
    """
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class ModelChoice:
    """Which models are measured, and how they are loaded."""

    models: tuple[str, ...] = option(
        (),
        "base, base+rope, adapter, trained (full fine-tune), merged, or NAME=FOLDER for any other "
        "model or adapter. Repeatable, or with commas. Default: all of the first four that exist.",
        metavar="MODEL",
        flag="model",
        repeatable=True,
    )
    adapter: str | None = option(
        None, "Trained adapter. Default: the recipe's output_dir.", metavar="FOLDER"
    )
    unquantized: bool = option(
        False, "Load the base model unquantized, even where the recipe quantizes it."
    )
    device_map: str | None = option(
        None,
        "Where the model's layers go, as transformers names it. Default: the recipe's device_map; "
        "auto where one process has several GPUs.",
        metavar="NAME",
    )


@dataclass(frozen=True)
class Files:
    """Where results go."""

    json: str | None = option(
        None,
        "Write all rows, a list, as they are done; rows that the file has are kept, and not "
        "measured again for the very same settings. -: to standard output.",
        metavar="FILE",
    )
    plot: str | None = option(None, "Draw the result.", metavar="FILE.png")
    card: bool = option(
        False, "Put the trained model's figures on the model cards of the run and its merged model."
    )


@dataclass(frozen=True)
class PerplexityOptions:
    """What `eval` measures."""

    data: tuple[str, ...] = option(
        (),
        "Text file, JSON Lines file with a text field, folder of those, or a Hugging Face dataset "
        "(name or name:configuration). Repeatable. Default: the recipe's longlora.held_out, else "
        "its test_datasets.",
        metavar="PATH",
        repeatable=True,
    )
    text_field: str | None = option(None, "Field that holds the text. Default: text.")
    split: str | None = option(None, "Split of a dataset. Default: test, else validation.")
    lengths: tuple[int, ...] = option(
        (),
        "Context lengths. Default: the base's context, its doublings, the length trained for.",
        metavar="512,1024,…",
    )
    stride: int | None = option(
        None, "Tokens a window moves by. Default: half of each length.", min=1
    )
    score: ScoreMode = option(
        "new",
        "new: each token once, in the first window that reads it. all: every token of every "
        "window, the original LongLoRA script's average.",
    )
    buckets: tuple[int, ...] = option(
        (),
        "Position buckets by their edges, in tokens. Default: two to a doubling.",
        metavar="0,256,…",
    )
    max_tokens: int | None = option(None, "Use the first tokens only.", min=2)
    batch_size: int | None = option(None, "Windows in a forward pass.", min=1)
    tokens: str | None = option(None, "Write token losses, safetensors.", metavar="FILE")

    def stride_for(self, length: int) -> int:
        if self.stride is None:
            return max(1, length // 2)
        # A stride for the longest windows reads shorter ones without overlap.
        return self.stride if self.stride > max(self.lengths) else min(self.stride, length)


@dataclass(frozen=True)
class PasskeyOptions:
    """What `passkey` asks."""

    lengths: tuple[int, ...] = option(
        (),
        "Tokens of prompt and answer at most; missed by less than one filler sentence. Default: "
        "the base model's context, its doublings, the length trained for.",
        metavar="512,1024,…",
    )
    depths: tuple[Depth, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "Shares of the text before the number, or random: another one each trial, as the original "
        "script has it.",
        metavar="0,0.5,…",
    )
    trials: int = option(10, "Questions for each length and depth.", min=1)
    seed: int = option(0, "Decides every trial.")
    batch_size: int | None = option(None, "Prompts in a forward pass.", min=1)


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` runs."""

    tasks: tuple[str, ...] = option(
        (),
        "Suites (ruler, ruler-offline, longbench2, babilong, graphwalks, short) or any task of "
        "lm-eval. helmet, nolima and longbench-original print the authors' commands. Default: "
        "ruler where the Hugging Face hub can be reached, else ruler-offline.",
        metavar="NAME,…",
    )
    lengths: tuple[int, ...] = option(
        (),
        "Context lengths. Default: the base's context, its doublings, the length trained for. "
        "Tasks that make no text of their own run once, at the longest.",
        metavar="4096,8192,…",
    )
    limit: int | None = option(None, "Examples of each task and length. Default: all.", min=1)
    batch_size: int = option(1, "Prompts in a forward pass.", min=1)
    chat_template: bool = option(False, "Put prompts into the tokenizer's chat template.")
    threshold: float = option(
        0.856,
        "Mean score at which a length counts as effective. RULER takes Llama2-7B's at 4096.",
    )
    output_path: str | None = option(
        None, "Also write each result as lm-eval writes it.", metavar="FOLDER"
    )
    eval_results: str | None = option(
        None,
        "Also write the trained model's scores to FOLDER/.eval_results, as the hub reads them.",
        metavar="FOLDER",
    )
