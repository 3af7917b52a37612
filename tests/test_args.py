"""The `longlora:` block: defaults, and one clear error for each wrong value."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from longlora_plugin.args import LongLoRAConfig, parse_block


def test_empty_block_has_the_contracts_defaults():
    block = parse_block(None)
    assert block.shifted_attention is True
    assert block.group_size_for(32768) == 8192
    assert block.full_attention_below == 0
    assert block.full_attention_steps_of(1000) == 100
    assert block.trainable == ["embeddings", "norms"]
    assert block.rope_preset == "auto"
    assert block.original_context is None


@pytest.mark.parametrize(
    ("block", "sequence_len", "group_size"),
    [
        ({"group_size": 2048}, 32768, 2048),
        ({"group_size_ratio": 0.5}, 1000, 500),
        ({"group_size_ratio": 0.25}, 1023, 254),
        ({"group_size": 64}, 64, 64),
    ],
)
def test_group_size_follows_sequence_len_and_is_even(block, sequence_len, group_size):
    assert parse_block(block).group_size_for(sequence_len) == group_size


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [(0.1, 1000, 100), (0.25, 10, 2), (7, 1000, 7), (7, 5, 5), (0, 100, 0), (1, 100, 1)],
)
def test_full_attention_steps_are_a_share_or_a_number(steps, total, expected):
    assert parse_block({"full_attention_steps": steps}).full_attention_steps_of(total) == expected


@pytest.mark.parametrize(
    ("rope", "preset", "options"),
    [
        ("yarn", "yarn", {}),
        ({"preset": "yarn", "factor": 8}, "yarn", {"factor": 8}),
        ("none", "none", {}),
        (None, "none", {}),
    ],
)
def test_rope_is_a_name_or_a_mapping(rope, preset, options):
    block = parse_block({"rope": rope})
    assert (block.rope_preset, block.rope_options) == (preset, options)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"group_sise": 8}, ["group_sise", "did you mean 'group_size'"]),
        ({"group_size": 8, "group_size_ratio": 0.5}, ["two answers", "keep one"]),
        ({"group_size": 7}, ["got 7", "even", "group_size: 8"]),
        ({"group_size": 0}, ["got 0", "at least 2", "group_size: 2"]),
        ({"group_size": -4}, ["got -4", "at least 2"]),
        ({"group_size_ratio": 1.5}, ["got 1.5", "above 0 and up to 1"]),
        ({"full_attention_below": -1}, ["full_attention_below", "got -1"]),
        ({"full_attention_steps": 1.5}, ["got 1.5", "share below 1", "(2)"]),
        ({"full_attention_steps": -1}, ["full_attention_steps", "got -1"]),
        ({"shifted_attention": "perhaps"}, ["shifted_attention", "got 'perhaps'"]),
        ({"rope": {"factor": 8}}, ["without a preset", "preset: yarn"]),
        (
            {"rope": {"preset": "yarn", "original_context": 8}},
            ["original_context is not an option", "longlora: {original_context"],
        ),
        ({"original_context": 0}, ["original_context", "got 0"]),
        ("on", ["got 'on'", "block of keys"]),
        (False, ["got False", "block of keys"]),
    ],
)
def test_wrong_value_says_what_was_given_and_what_to_write(raw, says):
    with pytest.raises(ValueError, match="longlora") as error:
        parse_block(raw)
    for part in says:
        assert part in str(error.value)


def test_all_wrong_keys_are_named_at_once():
    with pytest.raises(ValueError, match="longlora") as error:
        parse_block({"group_size": 3, "trainabel": [], "full_attention_below": -1})
    assert len(str(error.value).splitlines()) == 3


def test_group_larger_than_the_context_names_the_context():
    with pytest.raises(ValueError, match=r"group_size: 128 is larger than sequence_len: 64"):
        LongLoRAConfig(group_size=128).group_size_for(64)


def test_ratio_of_less_than_two_tokens_is_refused():
    with pytest.raises(ValueError, match="less than 2 tokens"):
        LongLoRAConfig(group_size_ratio=0.01).group_size_for(64)


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, longlora_plugin, longlora_plugin.args, longlora_plugin.registry, "
        "longlora_plugin.run.recipe, longlora_plugin.rope, longlora_plugin.cli; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("block", "instead"),
    [
        ({"trainable": "embeddings"}, "write trainable: [embeddings]"),
        ({"trainable": 3}, "write a list, for example trainable: [embeddings, norms]"),
        ({"group_size": "2k"}, "write a whole number, for example group_size: 2048"),
        ({"shifted_attention": "sometimes"}, "got 'sometimes'; write true or false"),
        ({"held_out": 3}, "write a name, for example held_out: books.txt"),
        ({"rope": 3}, "write a mapping, for example rope: {preset: yarn, factor: 8}"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_to_write(block, instead):
    with pytest.raises(ValueError, match=re.escape(instead)) as error:
        parse_block(block)
    assert "valid" not in str(error.value)
    assert "longlora.rope.str" not in str(error.value)
