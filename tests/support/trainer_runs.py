"""Real Axolotl runs for tests: short recipes on tiny models, in one process or in two with gloo.

`train` goes through a server that has Axolotl imported already (`forking_trainer.py`); `launch`
goes through `accelerate launch`, as a user does. Both end by a timeout.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import yaml
from axolotl_runs import python_path

SUPPORT = Path(__file__).parent
ENV = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A few rows are packed sooner than the code that packs them is compiled.
    "NUMBA_DISABLE_JIT": "1",
    # Without it accelerate looks for GPUs to put FSDP's processes on.
    "ACCELERATE_TORCH_DEVICE": "cpu",
}
TIMEOUT = 180
"""Seconds after which a run counts as hanging: several times what it takes on a busy machine."""
LAUNCHED = 300
"""The same where each process imports Axolotl anew."""


@dataclass(frozen=True)
class Run:
    """One finished run: the exit code of each process, what it printed, where it wrote."""

    codes: list[int]
    log: str
    output_dir: Path

    @property
    def adapter(self) -> dict[str, Any]:
        return adapter(self.output_dir)

    def losses(self, checkpoint: str) -> dict[int, float]:
        """Step → training loss, from a checkpoint's `trainer_state.json`."""
        state = json.loads((self.output_dir / checkpoint / "trainer_state.json").read_text())
        return {row["step"]: row["loss"] for row in state["log_history"] if "loss" in row}

    @property
    def printed_losses(self) -> list[float]:
        return [float(loss) for loss in re.findall(r"'loss': '([^']+)'", self.log)]

    def ok(self) -> Run:
        assert not any(self.codes), f"exit codes {self.codes}\n{self.log[-6000:]}"
        return self


def adapter(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def write_recipe(folder: Path, model: Path, dataset: Path, changes: Mapping[str, Any]) -> Path:
    """A recipe of six steps of four rows, a checkpoint at each third step."""
    plugins = ["longlora_plugin.LongLoRAPlugin", "cpu_shim.CpuShim"]
    keys = {
        **tiny.training(dataset, dataset.parent / f"prepared-{model.name}"),
        "plugins": [*plugins, "kill_switch.KillSwitch", "model_probe.ModelProbe"],
        "sequence_len": 128,
        "longlora": {"rope": "linear", "full_attention_steps": 2},
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 5.0e-3,
        "bf16": True,
        "dataloader_num_workers": 0,
        **changes,
    }
    return tiny.write_recipe(folder / "recipe.yml", model, folder / "out", keys)


@functools.lru_cache(maxsize=1)
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, str(SUPPORT / "forking_trainer.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENV, "PYTHONPATH": python_path()},
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", "the training server did not start"
    return server


def train(recipe: Path, *, processes: int = 1, env: Mapping[str, str] | None = None) -> Run:
    """Train in freshly forked processes, with torchrun's environment where there are several."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    log = recipe.with_suffix(".log")
    log.unlink(missing_ok=True)
    request = {
        "recipe": str(recipe),
        "processes": processes,
        "env": dict(env or {}),
        "log": str(log),
        "timeout": TIMEOUT,
    }
    print(json.dumps(request), file=server.stdin, flush=True)
    codes = json.loads(server.stdout.readline())
    return Run(codes, log.read_text(errors="replace"), _output_dir(recipe))


def launch(recipe: Path, *, deepspeed: Path, env: Mapping[str, str] | None = None) -> Run:
    """`accelerate launch … -m axolotl.cli.train` in two processes under DeepSpeed."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed"),
        *("--deepspeed_config_file", str(deepspeed), "--num_processes", "2"),
        *("--num_machines", "1", "-m", "axolotl.cli.train", str(recipe)),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, **ENV, "PYTHONPATH": python_path(), **(env or {})},
    )
    try:
        log, _ = process.communicate(timeout=LAUNCHED)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
    return Run([process.returncode], log, _output_dir(recipe))


def _output_dir(recipe: Path) -> Path:
    return Path(yaml.safe_load(recipe.read_text())["output_dir"])
