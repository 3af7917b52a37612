"""When a run changes to full attention, and what it says where it never did."""

from __future__ import annotations

import pytest
from transformers import TrainerState

from longlora_plugin.attention.schedule import AttentionSchedule


@pytest.mark.parametrize(
    ("stopped_after", "planned", "warned"),
    [(10, 4, ""), (10, 0, ""), (3, 0, ""), (3, 4, "0 of its 4 steps"), (8, 4, "2 of its 4 steps")],
)
def test_a_run_that_stops_before_its_full_attention_steps_says_so(
    stopped_after: int, planned: int, warned: str
) -> None:
    warnings: list[str] = []
    schedule = AttentionSchedule([], lambda _: planned, warnings.append, warnings.append)
    state = TrainerState(global_step=stopped_after, max_steps=10)
    schedule.on_train_end(None, state, None)
    assert len(warnings) == bool(warned)
    assert warned in "".join(warnings)
