"""One training step of a tiny model under DeepSpeed or FSDP2, or a row that two processes share, in
a process of its own.

`python -m longlora_plugin.doctor.launcher_step deepspeed|fsdp|context_parallel` prints one line
saying what ran; any error ends it with a traceback. `doctor` starts it: a launcher that hangs or
dies takes nothing down with it, and the process group it makes is gone afterwards.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import torch

WIDTH = 16


def _environment(device: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if device == "cuda":
        torch.cuda.set_device(0)


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1))


def _input(device: str) -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * WIDTH, device=device).view(4, WIDTH)


def _compare(trained: list[torch.Tensor], device: str) -> None:
    """With the parameters after one step of plain SGD: what each launcher must give."""
    model = _model().to(device)
    model(_input(device)).pow(2).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(trained, list(model.parameters()), atol=1e-5, rtol=1e-4)


def try_deepspeed(device: str) -> str:
    """A ZeRO-2 step. Returns what ran; raises whatever DeepSpeed raises, or AssertionError."""
    import deepspeed

    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
    model = _model().to(device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_batch_size": 1,
            "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at 1 where nothing is said
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.backward(engine(_input(device)).pow(2).mean())
    engine.step()
    _compare(list(engine.module.parameters()), device)
    return f"deepspeed {deepspeed.__version__}: a ZeRO-2 step on {device} equals plain SGD"


def try_fsdp(device: str) -> str:
    """An FSDP2 step. Returns what ran; raises whatever torch raises, or AssertionError."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    model: Any = _model().to(device)
    fully_shard(model, mesh=init_device_mesh(device, (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(_input(device)).pow(2).mean().backward()
    optimizer.step()
    _compare([parameter.full_tensor() for parameter in model.parameters()], device)
    return f"torch {torch.__version__}: an FSDP2 step on {device} equals plain SGD"


def main(launcher: str) -> None:
    """Take one step under `launcher`, in this process, and print what it comes to."""
    if launcher == "context_parallel":
        from longlora_plugin.doctor.exchange import try_exchange

        try_exchange()
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _environment(device)
    done = {"deepspeed": try_deepspeed, "fsdp": try_fsdp}[launcher](device)
    print(f"TRIAL {done}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
