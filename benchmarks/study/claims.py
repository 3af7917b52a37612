"""What the paper and its critics say, and what the study's rows say to it.

A claim compares two rows, seed by seed, so that what both owe to the seed cancels out. "A is
higher than B" *held* where every seed has it and the mean difference is at least `VISIBLE`; it
*did not hold* where every seed has the contrary by as much. "A is as good as B" held where no seed
lacks `EQUAL`, and did not hold where every seed lacks something and the mean at least that. All
else *cannot be seen* at this size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.study.plan import Row
from benchmarks.study.results import (
    Measured,
    Results,
    at,
    at_step,
    evaluated_sparse,
    perplexity,
    recalled,
    retrieved,
    retrieved_far,
)

VISIBLE = {"%": 0.5, "points": 5.0}
"""What a difference must reach to be called one: percent of perplexity, points of digits found."""

EQUAL = {"%": 1.0, "points": 5.0}
"""What a row may lack, with every seed, and still be as good as another."""


@dataclass(frozen=True)
class Verdict:
    """One line of the page: what is claimed, the paper's figures, those here, and what follows."""

    claim: str
    paper: str
    here: str
    verdict: str


@dataclass(frozen=True)
class Difference:
    """How much higher a figure of row A is than of row B, seed by seed: in % of B's, or points."""

    of_seed: tuple[float, ...]
    unit: str = "%"

    @property
    def mean(self) -> float:
        return statistics.fmean(self.of_seed)

    def text(self) -> str:
        seeds = len(self.of_seed)
        if seeds == 1:
            return f"{self.mean:+.1f} {self.unit}"
        low, high = min(self.of_seed), max(self.of_seed)
        return f"{self.mean:+.1f} {self.unit} ({low:+.1f} to {high:+.1f}, {seeds} seeds)"

    def higher(self) -> str:
        """The verdict on "A is higher"."""
        if self.mean >= VISIBLE[self.unit] and min(self.of_seed) > 0:
            return self._with_seeds("held")
        if self.mean <= -VISIBLE[self.unit] and max(self.of_seed) < 0:
            return self._with_seeds("did not hold")
        return self._with_seeds("cannot be seen")

    def equal(self) -> str:
        """The verdict on "A, where lower is better, is as good as B"."""
        if max(self.of_seed) < EQUAL[self.unit]:
            return self._with_seeds("held")
        if min(self.of_seed) > 0 and self.mean >= EQUAL[self.unit]:
            return self._with_seeds("did not hold")
        return self._with_seeds("cannot be seen")

    def _with_seeds(self, verdict: str) -> str:
        return verdict if len(self.of_seed) > 1 else f"{verdict} (one seed)"


def difference(
    results: Results,
    high: Row,
    low: Row,
    figure: Callable[[Measured], float],
    other: Callable[[Measured], float] | None = None,
    unit: str = "%",
) -> Difference | None:
    """Of the seeds that both rows have; `other` is the figure of `low` where it is another."""
    a, b = results.of(high), results.of(low)
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return None
    pairs = [(figure(a[seed]), (other or figure)(b[seed])) for seed in seeds]
    if unit == "points":
        return Difference(tuple(x - y for x, y in pairs), unit)
    return Difference(tuple(100 * (x / y - 1) for x, y in pairs))


@dataclass(frozen=True)
class Claim:
    """`high` has the higher figure than `low`, or, with `equal`, is about as high.

    `high` and `low` are (question, label) of rows in `plan.py`.
    """

    claim: str
    paper: str
    high: tuple[str, str]
    low: tuple[str, str]
    figure: Callable[[Measured], float]
    other: Callable[[Measured], float] | None = None
    equal: bool = False
    unit: str = "%"

    def judge(self, results: Results) -> Verdict:
        found = difference(
            results,
            results.row(*self.high),
            results.row(*self.low),
            self.figure,
            self.other,
            self.unit,
        )
        if found is None:
            return Verdict(self.claim, self.paper, "not run", "not run")
        verdict = found.equal() if self.equal else found.higher()
        return Verdict(self.claim, self.paper, found.text(), verdict)


FULL, S2, GROUPS = (
    ("attention", "full attention"),
    ("attention", "S²"),
    ("attention", "groups, no shift"),
)
TENTH = ("remedy-linear", "S², last 10% full")
BOTH = ("methods", "LongLoRA (both)")
X32_FULL, X32_S2 = ("x32", "full attention"), ("x32", "S²")

CLAIMS = (
    Claim(
        "S² trains as well as full attention (here LongLoRA, there full fine-tuning)",
        "8.04 against 8.02 at 8k, +0.2 %; 8.08 against 8.04 at 32k (Table 1)",
        S2,
        FULL,
        perplexity,
        equal=True,
    ),
    Claim(
        "… and in the last half of the length, which the paper does not show",
        "–",
        S2,
        FULL,
        at("last"),
        equal=True,
    ),
    Claim(
        "Groups without shift are worse than S²",
        "9.47 against 8.08 at 32k, +17 % (Table 1)",
        GROUPS,
        S2,
        perplexity,
    ),
    Claim(
        "LoRA alone is worse than LongLoRA (this and the next six: S², last 10 % full)",
        "11.44 against 8.12, +41 % (Table 2)",
        ("methods", "LoRA r=8"),
        BOTH,
        perplexity,
    ),
    Claim(
        "A higher rank does not help: r=8 is as good as r=128",
        "r=8 11.44 against r=256 11.98, -5 % (Table 2)",
        ("methods", "LoRA r=8"),
        ("methods", "LoRA r=128"),
        perplexity,
        equal=True,
    ),
    Claim(
        "LoRA with norms is better than LoRA",
        "LoRA 11.44 against 10.49, +9 % (Table 2)",
        ("methods", "LoRA r=8"),
        ("methods", "LoRA r=8 + norm"),
        perplexity,
    ),
    Claim(
        "LoRA with embeddings is better than LoRA",
        "LoRA 11.44 against 8.29, +38 % (Table 2)",
        ("methods", "LoRA r=8"),
        ("methods", "LoRA r=8 + embed"),
        perplexity,
    ),
    Claim(
        "Norms add to embeddings",
        "+ embed 8.29 against both 8.12, +2 % (Table 2)",
        ("methods", "LoRA r=8 + embed"),
        BOTH,
        perplexity,
    ),
    Claim(
        "LongLoRA is as good as full fine-tuning at the same rate, 1e-3",
        "8.12 against 8.08, +0.5 % (Table 2)",
        BOTH,
        ("methods", "full fine-tune"),
        perplexity,
        equal=True,
    ),
    Claim(
        "… and as full fine-tuning at 3e-4",
        "8.12 against 8.08, +0.5 % (Table 2)",
        BOTH,
        ("rates", "full fine-tune, 3e-4"),
        perplexity,
        equal=True,
    ),
    Claim(
        "A model trained with S² is worse evaluated with S² than with full attention",
        "8.64 against 8.12, +6 % (Table 6)",
        S2,
        S2,
        evaluated_sparse,
        other=perplexity,
    ),
    Claim(
        "Smaller groups are worse: 1/8 of the length against 1/4",
        "8.16 against 8.04, +1.5 % (Table 7)",
        ("groups", "1/8"),
        ("groups", "1/4"),
        perplexity,
    ),
    Claim(
        "Larger groups are no better than 1/4: 1/4 against 1/2",
        "8.04 against 8.04 (Table 7)",
        ("groups", "1/4"),
        ("groups", "1/2"),
        perplexity,
        equal=True,
    ),
    Claim(
        "S² whose last 10 % of the steps are full is as good as full attention: last half, linear",
        "not in the paper",
        TENTH,
        FULL,
        at("last"),
        equal=True,
    ),
    Claim(
        "… the same with YaRN",
        "not in the paper",
        ("remedy-yarn", "S², last 10% full"),
        ("remedy-yarn", "full attention"),
        at("last"),
        equal=True,
    ),
    Claim(
        "Extension helps: no scaling and no training against linear and LongLoRA, last half",
        "15.82 → 8.02 at 8k (Figure 5)",
        ("untrained", "none"),
        BOTH,
        at("last"),
    ),
    Claim(
        "Most of the gain comes in the first steps: before training against step 100, S²",
        "15.82 → 8.63 after 100 of 1000 (Figure 5)",
        ("steps", "S²"),
        ("steps", "S²"),
        at_step(0),
        other=at_step(100),
    ),
    Claim(
        "… and little after them: step 100 is as good as step 200",
        "8.63 → 8.16, 6 % (Figure 5)",
        ("steps", "S²"),
        ("steps", "S²"),
        at_step(100),
        other=at_step(200),
        equal=True,
    ),
    Claim(
        "Passkeys are found up to the trained length: 256 against 2048 tokens, S², last 10 % full",
        "100 % up to 32k of a 32k model",
        ("retrieval", "S², last 10% full"),
        ("retrieval", "S², last 10% full"),
        retrieved(256),
        other=retrieved(2048),
        equal=True,
        unit="points",
    ),
    Claim(
        "Trained with sparse attention, a model finds less: full attention against S², over 1024",
        "approximate attention falls behind on retrieval (arXiv 2409.12181)",
        ("retrieval", "full attention"),
        ("retrieval", "S²"),
        retrieved_far,
        unit="points",
    ),
    Claim(
        "With the last 10 % full it finds as much: full attention against that, over 1024",
        "not in the paper",
        ("retrieval", "full attention"),
        ("retrieval", "S², last 10% full"),
        retrieved_far,
        equal=True,
        unit="points",
    ),
    Claim(
        "… and with the last 25 % full",
        "not in the paper",
        ("retrieval", "full attention"),
        ("retrieval", "S², last 25% full"),
        retrieved_far,
        equal=True,
        unit="points",
    ),
    Claim(
        "×32: without training YaRN fails, last half: untrained against full attention",
        "not in the paper",
        ("x32", "YaRN, untrained"),
        X32_FULL,
        at("last"),
    ),
    Claim(
        "×32: S² trains as well as full attention, last half",
        "8.08 against 8.04 at 32k, ×8 (Table 1)",
        X32_S2,
        X32_FULL,
        at("last"),
        equal=True,
    ),
    Claim(
        "… and finds as many facts: full attention against S²",
        "approximate attention falls behind on retrieval (arXiv 2409.12181)",
        X32_FULL,
        X32_S2,
        recalled("all"),
        equal=True,
        unit="points",
    ),
    Claim(
        "… and with the last 25 % full",
        "not in the paper",
        X32_FULL,
        ("x32", "S², last 25% full"),
        recalled("all"),
        equal=True,
        unit="points",
    ),
    Claim(
        "… and with `attention_pattern: pose`, the last 30 % full",
        "not in the paper",
        X32_FULL,
        ("x32-rivals", "attention_pattern: pose, last 30% full"),
        recalled("all"),
        equal=True,
        unit="points",
    ),
    Claim(
        "×32, three times as many steps: S² trains as well as full attention, last half",
        "8.08 against 8.04 at 32k, ×8 (Table 1)",
        ("x32-longer", "S²"),
        ("x32-longer", "full attention"),
        at("last"),
        equal=True,
    ),
    Claim(
        "×32: groups without shift are worse than S²",
        "9.47 against 8.08 at 32k, +17 % (Table 1)",
        ("x32", "groups, no shift"),
        X32_S2,
        perplexity,
    ),
    Claim(
        "×32: LoRA alone is worse than LongLoRA (last 10 % full), last half",
        "11.44 against 8.12, +41 % (Table 2)",
        ("x32-methods", "LoRA r=8"),
        ("x32-methods", "LongLoRA (both)"),
        at("last"),
    ),
)
