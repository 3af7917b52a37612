"""The page of inference engines, from the matrix that `make test-engines` measures."""

from __future__ import annotations

import textwrap


def page() -> str:
    """The page, from what was measured."""
    from longlora_plugin.artifacts.engines import ENGINES, matrix

    rows = list(matrix().values())
    names = list(dict.fromkeys(row["engine"] for row in rows))
    ropes = list(dict.fromkeys(row["rope"] for row in rows))
    version = {row["engine"]: row["version"] for row in rows}
    lines = [
        "# Engines",
        "",
        "How inference engines read a merged folder: the log-likelihoods of a row of 1536 tokens, "
        "of models with a context of 256 that were extended to 2048, against transformers 5. "
        "`equal`: perplexity within 0.5 % inside and beyond the original context. Measured on a "
        "CPU by `make test-engines`; `longlora serve-check` reads the same rows.",
        "",
        f"| engine | model types | {' | '.join(ropes)} |",
        f"|---|---|{'---|' * len(ropes)}",
    ]
    for name in names:
        cells = []
        for rope in ropes:
            found = {
                f"{row['verdict']}" if row["verdict"] != "different" else f"{row['beyond']} ×"
                for row in rows
                if (row["engine"], row["rope"]) == (name, rope)
            }
            cells.append(", ".join(sorted(found)) or "not measured")
        types = ", ".join(sorted({row["model_type"] for row in rows if row["engine"] == name}))
        lines.append(f"| {name} {version[name]} | {types} | {' | '.join(cells)} |")
    lines += ["", "## Serving a merged folder", ""]
    for engine in ENGINES:
        names_of = {"folder": "outputs/run/merged", "context": 32768, "name": "merged"}
        command = engine.command.format(base="BASE", rope="ROPE", **names_of)
        seen = "; ".join(f"`{rope}`: {why}" for rope, why in (engine.loses or {}).items())
        notes = ". ".join(filter(None, (engine.note, seen)))
        source = f" Read in the source of {engine.version}, not run." if engine.version else ""
        lines += [f"**{engine.name}**{': ' + notes if notes else ''}.{source}", ""]
        lines += ["```text", *textwrap.wrap(command, 76, break_long_words=False), "```", ""]
    return "\n".join(lines).rstrip() + "\n"
