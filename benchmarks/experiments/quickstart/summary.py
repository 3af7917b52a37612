"""What the quickstart showed, after `make demo`.

    python -m benchmarks.experiments.quickstart.summary OUT_DIR

Reads the rows that `longlora eval` wrote and says, with numbers, whether the base model
gets worse beyond its context and the extended model does not. Buckets are averages over the same
text at different positions. Exits with 1 if something did not hold.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONTEXT = 256
"""Tokens the bundled model was trained for."""


def main(out: Path) -> int:
    rows = json.loads((out / "eval.json").read_text())
    longest = max(row["length"] for row in rows)
    perplexity = {
        row["model"]: {b["to"]: b["perplexity"] for b in row["buckets"]}
        for row in rows
        if row["length"] == longest
    }
    base, extended = perplexity["base"], perplexity["adapter"]
    claims = [
        (
            "the base model gets clearly worse beyond its context",
            base[longest] / base[CONTEXT],
            "at least 1.15",
            base[longest] >= 1.15 * base[CONTEXT],
        ),
        (
            "the extended model does not",
            extended[longest] / extended[CONTEXT],
            "at most 1.00",
            extended[longest] <= extended[CONTEXT],
        ),
        (
            "at the original context it is as good as the base",
            extended[CONTEXT] / base[CONTEXT],
            "at most 1.10",
            extended[CONTEXT] <= 1.10 * base[CONTEXT],
        ),
    ]
    table = Table(title=f"Held-out text, context {CONTEXT} → {longest}: ratios of perplexity")
    table.add_column("claim")
    table.add_column("measured", justify="right")
    table.add_column("wanted", justify="right")
    table.add_column("held")
    for claim, ratio, wanted, held in claims:
        table.add_row(claim, f"{ratio:.3f}", wanted, "yes" if held else "NO")
    console = Console()
    console.print(table)
    console.print(f"\nThe picture: {out / 'perplexity.png'}   the numbers: {out / 'eval.json'}")
    console.print(f"The merged model, which needs no plugin: {out / 'run' / 'merged'}")
    console.print(
        "\nWhat to try next:\n"
        "  put the two lines of the README into a recipe of yours\n"
        "  longlora plan RECIPE --gpu a100-80gb --gpus 8\n"
        "      will it fit, what will it cost\n"
        "  longlora passkey RECIPE --lengths 512,2048\n"
        "      does it find things again"
    )
    return 0 if all(held for *_, held in claims) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
