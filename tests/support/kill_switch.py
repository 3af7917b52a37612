"""Test-only Axolotl plugin: `kill -9` of this process after step LONGLORA_TEST_KILL_AFTER."""

from __future__ import annotations

import os
import signal

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class _Kill(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_log(self, args, state, control, **kwargs):
        # The launcher ends the others; one of them must not end this one before it has printed.
        if state.is_world_process_zero and state.global_step == self.after:
            print(f"killed after step {self.after}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


class KillSwitch(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        after = int(os.environ.get("LONGLORA_TEST_KILL_AFTER", "0"))
        return [_Kill(after)] if after else []
