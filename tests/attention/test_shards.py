"""S²-Attn of rows that several processes share equals one process, with the formula's bytes.

The processes are real and talk over gloo; they are started once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import sharded_models
import sharded_rows
import torch
from processes import Processes

from longlora_plugin.attention.shards import Transfer, transfers

EXACT = 1e-12
FIRST, CASES = (
    int(os.environ.get(f"LONGLORA_SHARD_{x}", n)) for x, n in (("SEED", 0), ("CASES", 500))
)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes(4, sharded_models.__name__)
    yield started
    started.stop()


def all_alike(found: list[Any]) -> Any:
    assert all(each == found[0] for each in found), found
    return found[0]


# --- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_random_shards_equal_one_process_and_exchange_what_the_definition_needs(
    size: int, processes: Processes
) -> None:
    found = processes.run(sharded_rows.random_rows, range(CASES), size=size)
    for errors, kinds in found:
        assert isinstance(errors, dict), (errors, kinds)
        assert set(errors) == {"output", "query", "key", "value"}
        assert max(errors.values()) <= EXACT, errors
    kinds = found[-1][1]
    print(size, kinds, [max(errors.values()) for errors, _ in found])
    assert kinds.pop("cases") == CASES
    assert len(kinds) == 15
    for kind, cases in kinds.items():
        # Two processes have no halo over several shards.
        assert cases >= CASES // 40 or (size == 2 and kind.startswith("a halo")), kinds


def test_a_token_is_sent_by_whoever_has_it_to_every_later_process_whose_halo_holds_it() -> None:
    bounds = (((0, 4),), ((4, 6),), ((6, 6),), ((6, 12),))
    assert transfers(bounds, [[0], [3], [0], [5]]) == (
        Transfer(0, 1, 0, 1, 4),
        Transfer(0, 3, 0, 1, 4),
        Transfer(1, 3, 0, 4, 6),
    )
    assert transfers(bounds, [[0], [0], [0], [0]]) == ()


# --- models --------------------------------------------------------------------------------------

LAYERS = 2


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("documents", [(48,), (5, 21, 13, 9)], ids=["one", "packed"])
def test_gradients_of_a_model_are_one_processs_under_every_checkpointing(
    documents: tuple[int, ...], checkpointing: bool | None, processes: Processes
) -> None:
    options = {"group_size": 16, "checkpointing": checkpointing}
    found = processes.run(sharded_models.train, (13, 2, 20, 13), [documents], options, size=4)
    for worst, traffic in found:
        assert worst <= EXACT, found
        assert traffic.exchanges == LAYERS * (2 if checkpointing is None else 3)
        assert traffic.gathers == [3, 20], "a header and the positions, once a pass"


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_recomputation_knows_its_own_row_among_several_passes(
    checkpointing: bool | None, thread: bool, processes: Processes
) -> None:
    options = {"group_size": 8, "checkpointing": checkpointing, "thread": thread}
    passes = [(40,), (11, 29), (3, 3, 34)]
    found = processes.run(sharded_models.train, (20, 20), passes, options, size=2)
    for worst, traffic in found:
        assert worst <= EXACT, found
        assert traffic.gathers == [3, 20] * len(passes)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_at_the_end_belongs_to_no_document(
    implementation: str, processes: Processes
) -> None:
    options = {"group_size": 8, "padded": 23, "implementation": implementation}
    for worst, _ in processes.run(sharded_models.train, (20, 20), [(40,)], options, size=2):
        assert worst <= EXACT


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group_size", [8, 12, 10, 100])
def test_numbers_sent_are_the_plans_formula_and_do_not_grow_where_the_group_divides_the_shard(
    size: int, group_size: int, processes: Processes
) -> None:
    # Not needed where only the tests of a GPU run.
    from longlora_plugin.plan.parallel import bytes_sent
    from longlora_plugin.plan.shape import shape_of

    shape, sent = shape_of(sharded_models.llama()), set()
    for shard in (24, 72):
        found = processes.run(
            sharded_models.train,
            (shard,) * size,
            [(shard * size,)],
            {"group_size": group_size},
            size=size,
        )
        formula = LAYERS * bytes_sent(shape, shard * size, size, group_size, bytes_each=1)["halo"]
        assert max(traffic.received_forward for _, traffic in found) == formula
        # Backward, what came goes back.
        received = sum(traffic.received for _, traffic in found)
        assert received == 2 * sum(traffic.received_forward for _, traffic in found)
        sent.add(formula)
    assert len(sent) == 1 or shard % group_size


def test_where_nothing_crosses_nothing_is_sent(processes: Processes) -> None:
    documents = (24, 24)  # each process has one document of its own
    for worst, traffic in processes.run(
        sharded_models.train, (24, 24), [documents], {"group_size": 8}, size=2
    ):
        assert worst <= EXACT
        assert (traffic.exchanges, traffic.sent, traffic.received) == (0, 0, 0)


def test_a_group_of_one_process_is_no_group_bit_for_bit(processes: Processes) -> None:
    assert processes.run(sharded_models.alone, size=1) == [True]


def test_removed_leaves_registries_and_hooks_as_before(processes: Processes) -> None:
    for before, after in processes.run(sharded_models.enable_and_remove, size=2):
        assert before == after


# --- errors: alike on every process, and no process waits --------------------------------------

ROW = torch.arange(20)[None]
SHARDS = [{"input_ids": ROW[:, :10], "position_ids": ROW[:, :10]}]
SHARDS.append({"input_ids": ROW[:, 10:], "position_ids": ROW[:, 10:]})
TWICE = {name: x.expand(2, -1) for name, x in SHARDS[1].items()}
ZIGZAG = [torch.cat([ROW[:, a : a + 5], ROW[:, b : b + 5]], 1) for a, b in ((0, 15), (5, 10))]
WRONG = {
    "zigzag": (
        [{"input_ids": x, "position_ids": x} for x in ZIGZAG],
        "token 5 of row 0 has position 15, which neither",
    ),
    "the order of ranks": (SHARDS[::-1], "token 0 of row 0 has position 10, which neither"),
    "unequal rows": ([SHARDS[0], TWICE], r"unequal shards, .*: \[1, 10\], \[2, 10\]"),
    "no positions": (
        [SHARDS[0], {"input_ids": ROW[:, 10:]}],
        r"given no position_ids.*process 1 of the group",
    ),
    "an empty shard": (
        [{name: x[:, :0] for name, x in SHARDS[0].items()}, SHARDS[0]],
        "processes hold 0, 10 tokens of a row",
    ),
    "a mask of the whole row": (
        [{**SHARDS[0], "attention_mask": torch.ones(1, 20)}, SHARDS[1]],
        r"attention_mask that is not.*process 0",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_together_is_the_same_error_on_every_process(
    what: str, processes: Processes
) -> None:
    given, message = WRONG[what]
    said = all_alike(processes.run(sharded_models.refuse, given, size=2))
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
          "rope_theta": 10_000.0}}, "RoPE of type dynamic"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention",
          "sliding_attention"]}, "layers that shifted attention does not cover"),
        ({"model_type": "gemma3_text", "sliding_window": 8}, "does not cover|covers no layer"),
    ],
)  # fmt: skip
def test_models_whose_parts_would_take_a_shard_for_the_row_are_refused(
    changes: dict[str, Any], message: str, processes: Processes
) -> None:
    said = all_alike(processes.run(sharded_models.refuse_model, changes, size=2))
    assert re.search(message, said), said
