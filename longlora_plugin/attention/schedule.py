"""When a run trains with S²-Attn and when with the model's own attention.

The last steps with full attention repair most of what sparse training costs at long range. The
switch follows the global step, so a resumed run switches where an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from longlora_plugin.attention.install import ShiftedAttention


class AttentionSchedule(TrainerCallback):
    """Switches S²-Attn off for the last steps, and sees that it really ran before.

    Args:
        handles: of the models that the run loaded (a reference model is one, too).
        full_attention_steps: function of the run's total steps → how many of the last ones use
            full attention.
        log: takes one line.
        warn: takes one line that the user should act on.
    """

    def __init__(
        self,
        handles: Sequence[ShiftedAttention],
        full_attention_steps: Callable[[int], int],
        log: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.handles = handles
        self.full_attention_steps = full_attention_steps
        self.log = log
        self.warn = warn

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first_full = state.max_steps - self.full_attention_steps(state.max_steps)
        sparse = state.global_step < first_full
        if any(handle.active != sparse for handle in self.handles):
            for handle in self.handles:
                handle.active = sparse
            self.log(
                f"step {state.global_step} of {state.max_steps}: training goes on with "
                + ("shifted attention" if sparse else "full attention")
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        policies = [handle for handle in self.handles if handle.follows is None]
        if any(handle.active for handle in policies) and not any(
            handle.calls for handle in policies
        ):
            layers = max(handle.layers for handle in policies)
            raise RuntimeError(
                f"shifted attention covers {layers} layers but ran in none of them; "
                "something replaced their attention. Write longlora: {shifted_attention: false} "
                "to train with full attention, and please report the model and the recipe"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        planned = self.full_attention_steps(state.max_steps)
        done = max(0, state.global_step - (state.max_steps - planned))
        if done < planned:
            self.warn(
                f"training stopped after step {state.global_step} of {state.max_steps}: {done} of "
                f"its {planned} steps with full attention were run. To run them, resume without "
                "what stopped it, or plan fewer steps: max_steps"
            )
