"""The page of inference engines, from the matrix that `make test-engines` measures."""

from __future__ import annotations

import textwrap
from typing import Any

PRESETS = ["yarn", "linear", "llama3", "ntk", "theta", "dynamic", "longrope"]


def page() -> str:
    """The page, from what was measured."""
    from longlora_plugin.artifacts.engines import ENGINES, matrix

    rows = list(matrix().values())
    ropes = sorted({row["rope"] for row in rows}, key=PRESETS.index)
    lines = [
        "# Engines",
        "",
        "How inference engines read a merged folder: the log-likelihoods of a row of 1536 tokens, "
        "of models with a context of 256 that were extended to 2048, against transformers 5. "
        "`equal`: perplexity within 0.5 %, for another version of transformers within 0.05 %, "
        "inside and beyond the original context; else perplexity over that of transformers 5 at "
        "tokens 256–1023 / 1024–1535; –: not tried. (The 0.05 % were set after Gemma 3's "
        "longrope in transformers 4 was seen to be wrong and to pass with 0.5 %; no other "
        "verdict changed.) Measured on a CPU by `make test-engines`; `longlora serve-check` "
        "reads the same rows. `llama` is the quickstart's base model, the others are random. In "
        "five of six layers Gemma 3's RoPE is not scaled: another kind of RoPE changes its "
        "perplexity by 0.1 to 1 % only, so that its "
        "rows say less than the others.",
        "",
        f"| engine | model type | {' | '.join(ropes)} |",
        f"|---|---|{'---|' * len(ropes)}",
    ]
    refusals: dict[str, None] = {}
    for name, version in dict.fromkeys((row["engine"], row["version"]) for row in rows):
        for model_type in dict.fromkeys(r["model_type"] for r in rows if r["engine"] == name):
            found = {
                row["rope"]: row
                for row in rows
                if (row["engine"], row["model_type"]) == (name, model_type)
            }
            cells = [_cell(found.get(rope)) for rope in ropes]
            lines.append(f"| {name} {version} | {model_type} | {' | '.join(cells)} |")
            for row in found.values():
                if row["verdict"] == "refused":
                    refusals[f"- {name}: {row['error']}"] = None
    if refusals:
        lines += ["", "What engines say when they refuse:", "", *refusals]
    lines += ["", "## Serving a merged folder", ""]
    for engine in ENGINES:
        names_of = {"folder": "outputs/run/merged", "context": 32768, "name": "merged"}
        command = engine.command.format(base="BASE", rope="ROPE", **names_of)
        seen = "; ".join(f"`{rope}`: {why}" for rope, why in (engine.refuses or {}).items())
        notes = ". ".join(filter(None, (engine.note, seen)))
        source = f" Read in the source of {engine.version}, not run." if engine.version else ""
        lines += [f"**{engine.name}**{': ' + notes if notes else ''}.{source}", ""]
        lines += ["```text", *textwrap.wrap(command, 76, break_long_words=False), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["verdict"] != "different":
        return str(row["verdict"])
    inside, beyond = (
        "NaN" if ratio is None or ratio == float("inf") else f"{ratio:.3g}"
        for ratio in (row["inside"], row["beyond"])
    )
    return f"**{inside} / {beyond}**"
