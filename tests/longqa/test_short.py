"""Short instructions that are mixed in."""

from __future__ import annotations

import json

import pytest
from longqa_material import rows

from longlora_plugin.longqa.row_files import read_short

for package in ("sentencex", "datasketch"):
    pytest.importorskip(package)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_short_instructions_get_their_share_all_along_the_file(build, stories, tmp_path, share):
    short = tmp_path / "short.json"
    short.write_text(
        json.dumps(
            [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(500)]
        )
    )
    out = tmp_path / "a.jsonl"
    result = build(stories, out, "--short", short, "--short-share", share)
    assert result.exit_code == 0
    found = [len(row["instruction"]) < 20 for row in rows(out)]
    assert all(set(row) == {"instruction", "output"} for row in rows(out))
    for end in (len(found) // 2, len(found)):
        assert sum(found[:end]) / end == pytest.approx(share, abs=0.03)
    assert len(
        {row["instruction"] for row in rows(out)} & {f"Say {n}." for n in range(500)}
    ) == sum(found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no rows"),
        ("not json\n", "is not JSON"),
        ('{"question": "a"}\n', r"row 1 has the keys \['question'\]"),
        ("[1]", "row 1 is 1"),
        ('{"instruction": "é"}', "row 1 is not UTF-8; save the file as UTF-8"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_file_of_short_instructions_says_where(tmp_path, content, says):
    path = tmp_path / "short.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=says):
        read_short(path)


def test_a_list_may_begin_with_white_space(tmp_path):
    path = tmp_path / "short.json"
    path.write_text('\n  [{"instruction": "a", "output": "b"}]')
    assert read_short(path) == [{"instruction": "a", "output": "b"}]
