"""Rows that processes share under DeepSpeed: those of an unshared loader, with whole gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from processes import Processes

from longlora_plugin.host.compat import RecipeError
from longlora_plugin.host.context_parallel import train_under_deepspeed

deepspeed = pytest.importorskip("deepspeed")
if Version(deepspeed.__version__) < Version("0.19"):
    reason = "before DeepSpeed 0.19 its loader gathers a tensor without dimensions, as gloo cannot"
    pytest.skip(f"{reason}; make test-matrix has a later one", allow_module_level=True)
import rows_of_epochs  # noqa: E402

REDUCE_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


@pytest.fixture(scope="module")
def processes():
    started = Processes(2, rows_of_epochs.__name__)
    yield started
    started.stop()


@pytest.mark.parametrize("trained", [0, 3, 10, 13, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_shared_rows_of_each_epoch_are_those_of_an_unshared_loader(packed, trained, processes):
    expected = rows_of_epochs.read(rows_of_epochs.loader_of(packed), trained)
    assert sum(map(len, expected)) == 30 - trained
    assert all(set(rows) == set(range(10)) for rows in expected[1:])
    assert len(set(map(tuple, expected))) == len(expected), "epochs are drawn apart"
    for found in processes.run(rows_of_epochs.read_shared, packed, trained, size=2):
        assert found == expected


def gradient(stage: int) -> float:
    """Of a loss of 1 x, through the accelerator's `backward`."""
    accelerator = rows_of_epochs.Accelerator(stage)
    undo = train_under_deepspeed(SimpleNamespace(accelerator=accelerator), 4)
    x = torch.zeros((), requires_grad=True)
    accelerator.backward(x)
    undo()
    return float(x.grad)


@pytest.mark.parametrize("changed", ["nothing", "version", "name"])
def test_zero3_is_refused_where_its_gradients_are_not_known_and_zero2_never(changed, monkeypatch):
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if changed == "version":
        monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    if changed == "name":
        monkeypatch.delattr(DeepSpeedZeroOptimizer_Stage3, REDUCE_SCATTER)
    assert gradient(2) == 1
    if changed == "nothing":
        assert gradient(3) == 4
        return
    with pytest.raises(RecipeError, match=r'under ZeRO-3 of DeepSpeed 0\..*write .*"stage": 2'):
        gradient(3)
