"""Which runs the study consists of, in the order of their worth: the questions, then their rows.

A run that answers two questions is made once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.study.settings import Settings

SEEDS = (0, 1, 2)
ONE = (0,)
LATE = (
    *(("four-times", label) for label in ("full attention", "S²", "S², last 10% full")),
    *(("presets", label) for label in ("dynamic", "none")),
    ("steps", "full attention"),
)
"""(question, label) of rows that are made last."""

NOT_QUICK = ("x32-rivals", "x32-longer", "x32-methods")
"""Questions with several seeds that the quick mode leaves out."""

MAIN = Settings(finish=0.1)
PAPER = Settings(rope="linear")
RETRIEVAL = Settings(task="retrieval")
HARD = replace(RETRIEVAL, rope="linear")
GROWING = (256, 512, 1024)
X32 = Settings(task="recall", steps=60, tokens_a_step=2048)
UNTRAINED = Settings(attention="full", steps=0)


@dataclass(frozen=True)
class Row:
    """A line of a table: one setting, run with each seed."""

    label: str
    settings: Settings
    seeds: tuple[int, ...] = SEEDS

    def runs(self) -> list[Settings]:
        return [replace(self.settings, seed=seed) for seed in self.seeds]


@dataclass(frozen=True)
class Question:
    """A table of the study."""

    name: str
    title: str
    rows: tuple[Row, ...]


def finishing(base: Settings, seeds_of_shares: dict[float, tuple[int, ...]]) -> tuple[Row, ...]:
    return tuple(
        Row(f"S², last {share:.0%} full", replace(base, finish=share), seeds)
        for share, seeds in seeds_of_shares.items()
    )


def attention(base: Settings) -> tuple[Row, ...]:
    return (
        Row("full attention", replace(base, attention="full")),
        Row("groups, no shift", replace(base, attention="groups")),
        Row("S²", base),
    )


def methods(base: Settings) -> tuple[Row, ...]:
    return (
        Row("full fine-tune", replace(base, method="full")),
        Row("LoRA r=8", replace(base, method="lora")),
        Row("LoRA r=32", replace(base, method="lora", rank=32), ONE),
        Row("LoRA r=128", replace(base, method="lora", rank=128)),
        Row("LoRA r=8 + norm", replace(base, method="lora+norm")),
        Row("LoRA r=8 + embed", replace(base, method="lora+embed")),
        Row("LongLoRA (both)", base),
    )


def adapters(base: Settings) -> tuple[Row, ...]:
    return (
        Row("LongLoRA (both)", base),
        Row("LoRA r=8", replace(base, method="lora")),
        Row("LoRA r=8 + norm", replace(base, method="lora+norm")),
        Row("LoRA r=8, on embeddings too", replace(base, method="lora-on-embed"), ONE),
        Row("… + norm", replace(base, method="lora-on-embed+norm"), ONE),
    )


def presets(base: Settings, *names: str) -> tuple[Row, ...]:
    return tuple(
        Row("theta 500000", replace(base, rope="theta", theta=5e5), ONE)
        if name == "theta"
        else Row(name, replace(base, rope=name), ONE)
        for name in names
    )


SHARES = {0.02: ONE, 0.05: ONE, 0.1: SEEDS, 0.25: ONE}

X32_ROWS = (
    Row("YaRN, untrained", replace(X32, attention="full", steps=0), ONE),
    Row("full attention", replace(X32, attention="full")),
    Row("S²", X32),
    *finishing(X32, dict.fromkeys((0.05, 0.1, 0.25, 0.34), SEEDS)),
    Row("groups, no shift", replace(X32, attention="groups")),
)

X32_RIVALS = (
    Row(
        "PoSE, rows of 512",
        replace(X32, attention="full", short_share=1.0, skipped=True),
    ),
    Row(
        "rows of 512, last 25% long",
        replace(X32, attention="full", short_share=0.75),
    ),
    Row(
        "PoSE, rows of 512, last 25% long",
        replace(X32, attention="full", short_share=0.75, skipped=True),
    ),
    Row(
        "PoSE, rows of 512, last 34% long",
        replace(X32, attention="full", short_share=0.66, skipped=True),
    ),
    Row("attention_pattern: pose, last 30% full", replace(X32, attention="pose", finish=0.3)),
    Row(
        "PoSE, rows of 512, last 30% long",
        replace(X32, attention="full", short_share=0.7, skipped=True),
    ),
    Row(
        "PoSE, rows of 512, last 10% long",
        replace(X32, attention="full", short_share=0.9, skipped=True),
    ),
    Row("S², random 25% full", replace(X32, random_full=0.25)),
    Row("S², groups 256, 512, 1024, last 25% full", replace(X32, growing=GROWING, finish=0.25)),
    Row("S² with 256 sink tokens", replace(X32, attention="sinks", sinks=256)),
    Row("S², first layer full", replace(X32, full_layers=(0,))),
    Row("S², first layer full, last 10% full", replace(X32, full_layers=(0,), finish=0.1)),
)

X32_METHODS = (
    Row("LoRA r=8", replace(X32, finish=0.1, method="lora")),
    Row("LoRA r=8 + norm", replace(X32, finish=0.1, method="lora+norm")),
    Row("LoRA r=8 + embed", replace(X32, finish=0.1, method="lora+embed")),
    Row("LongLoRA (both)", replace(X32, finish=0.1)),
    Row("LongLoRA, linear", replace(X32, finish=0.1, rope="linear")),
)

LONGER = replace(X32, steps=180)
X32_LONGER = (
    Row("full attention", replace(LONGER, attention="full")),
    Row("S²", LONGER),
    *finishing(LONGER, {0.25: SEEDS}),
    Row("attention_pattern: pose, last 30% full", replace(LONGER, attention="pose", finish=0.3)),
)

QUESTIONS = (
    Question("x32", "×32 from 64 bytes, YaRN", X32_ROWS),
    Question("x32-rivals", "×32: rivals at about the cost of S² with a full finish", X32_RIVALS),
    Question("x32-longer", "×32: three times as many steps", X32_LONGER),
    Question("x32-methods", "×32: what is trained, and RoPE, S², last 10 % full", X32_METHODS),
    Question(
        "remedy-yarn",
        "Finishing with full attention, YaRN",
        (
            Row("full attention", Settings(attention="full")),
            Row("S²", Settings()),
            *finishing(Settings(), SHARES),
        ),
    ),
    Question(
        "attention",
        "Attention while training (Table 1, here with LongLoRA), linear RoPE",
        attention(PAPER),
    ),
    Question(
        "methods",
        "What is trained (Table 2), linear RoPE, S² with the last 10 % full",
        methods(replace(PAPER, finish=0.1)),
    ),
    Question(
        "adapters",
        "Smaller adapters, linear RoPE, S² with the last 10 % full",
        adapters(replace(PAPER, finish=0.1)),
    ),
    Question(
        "retrieval",
        "Finding a passkey, YaRN",
        (
            Row("YaRN, untrained", replace(RETRIEVAL, attention="full", steps=0), ONE),
            Row("full attention", replace(RETRIEVAL, attention="full")),
            Row("S²", RETRIEVAL),
            *finishing(RETRIEVAL, SHARES),
            Row("S², random 25% full", replace(RETRIEVAL, random_full=0.25), ONE),
            Row("S², first layer full", replace(RETRIEVAL, full_layers=(0,)), ONE),
            Row("S², groups of 1000", replace(RETRIEVAL, group=1000), ONE),
            Row(
                "S² with 256 sink tokens",
                replace(RETRIEVAL, attention="sinks", sinks=256),
                ONE,
            ),
        ),
    ),
    Question(
        "retrieval-linear",
        "Finding a passkey, linear RoPE",
        (
            Row("linear, untrained", replace(HARD, attention="full", steps=0), ONE),
            Row("full attention", replace(HARD, attention="full"), ONE),
            Row("S²", HARD, ONE),
            *finishing(HARD, {0.1: ONE, 0.25: ONE}),
        ),
    ),
    Question(
        "remedy-linear",
        "Finishing with full attention, linear RoPE",
        (
            Row("full attention", replace(PAPER, attention="full")),
            Row("S²", PAPER),
            *finishing(PAPER, SHARES),
        ),
    ),
    Question(
        "groups",
        "Group size as a share of the length (Table 7), linear RoPE",
        (
            Row("1/2", replace(PAPER, group=1024), ONE),
            Row("1/4", PAPER),
            Row("1/6", replace(PAPER, group=342), ONE),
            Row("1/8", replace(PAPER, group=256), ONE),
        ),
    ),
    Question(
        "steps",
        "Number of steps (Figure 5), linear RoPE",
        tuple(
            Row(
                label,
                replace(PAPER, attention=kind, steps=200, watch=(0, 10, 25, 50, 100, 150)),
                ONE,
            )
            for label, kind in (("full attention", "full"), ("S²", "s2"))
        ),
    ),
    Question(
        "presets",
        "RoPE presets, S², last 10 % full",
        (
            Row("linear", replace(MAIN, rope="linear")),
            Row("yarn", MAIN),
            *presets(MAIN, "ntk", "llama3", "theta", "dynamic", "none"),
        ),
    ),
    Question(
        "untrained",
        "RoPE presets before any training",
        presets(UNTRAINED, "linear", "yarn", "ntk", "llama3", "theta", "dynamic", "none"),
    ),
    Question(
        "four-times",
        "Extending ×4, YaRN",
        (
            Row("full attention", Settings(attention="full", target=1024, group=256), ONE),
            Row("S²", Settings(target=1024, group=256), ONE),
            *finishing(Settings(target=1024, group=256), {0.1: ONE}),
        ),
    ),
    Question(
        "rates",
        "Is it the learning rate? linear RoPE, last 10 % full",
        (
            Row(
                "full fine-tune, 3e-4",
                replace(PAPER, finish=0.1, method="full", learning_rate=3e-4),
                ONE,
            ),
            Row(
                "LoRA r=8, 3e-3", replace(PAPER, finish=0.1, method="lora", learning_rate=3e-3), ONE
            ),
            Row("LongLoRA, 3e-4", replace(PAPER, finish=0.1, learning_rate=3e-4), ONE),
        ),
    ),
)


def runs(*, quick: bool = False) -> list[Settings]:
    """Every run once, the most telling first: main rows are those with several seeds.

    Args:
        quick: only the first seed of the main rows.
    """
    rows = [(q.name, row) for q in QUESTIONS for row in q.rows]
    core = [row for name, row in rows if row.seeds == SEEDS and name not in NOT_QUICK]
    more = [row for name, row in rows if row.seeds == SEEDS and name in NOT_QUICK]
    late = [row for name, row in rows if (name, row.label) in LATE]
    early = [row for _, row in rows if row.seeds == ONE and row not in late]
    first, *further = SEEDS
    passes = [(core, first)]
    if not quick:
        passes += [(more, first), (early, first)]
        passes += [*((core + more, seed) for seed in further), (late, first)]
    wanted = {replace(row.settings, seed=seed): None for some, seed in passes for row in some}
    return list(wanted)
