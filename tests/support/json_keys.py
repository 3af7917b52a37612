"""What a command writes to `--json` has the keys that its page describes."""

from __future__ import annotations

from typing import Any

from json_tables import OBJECTS, ROWS, keys_of


def assert_documented(command: str, content: Any) -> None:
    """Exactly the documented keys, in every row of a list or in the one object."""
    rows = content if command in ROWS else [content]
    documented = sorted(keys_of((ROWS | OBJECTS)[command]))
    assert rows
    for row in rows:
        assert sorted(row) == documented
