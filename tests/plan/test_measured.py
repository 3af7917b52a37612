"""The share of the peak that `plan` assumes comes from `make gpu` where it measured such a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_shares
import pytest
from plan_material import invoke, tiny_llama, write_recipe

from longlora_plugin.plan import cost as planned_cost

H100 = "NVIDIA H100 80GB HBM3 (compute capability 9.0), torch 2.13.0, transformers 5.17.0"


def row(seconds: float, attention: str = "s2", machine: str = H100, **result: float) -> dict:
    result = {"seconds": seconds, "planned_tflop": 989.0, **result}
    return {"section": "step", "attention": attention, "machine": machine, "result": result}


def test_share_is_the_median_of_the_s2_steps_of_a_known_gpu() -> None:
    rows = [row(2.5), row(2.0), row(4.0), row(1.0, "full"), {"section": "step", "machine": H100}]
    assert gpu_shares.shares_of({"rows": rows}) == {"h100-80gb": 0.4}
    assert gpu_shares.shares_of({"rows": [row(2.0, machine="a CPU")]}) == {}
    assert gpu_shares.shares_of({"rows": []}) == {}


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100", None),
    ],
)
def test_gpu_is_known_by_the_name_that_torch_gives_it(machine: str, name: str | None) -> None:
    found = gpu_shares.shares_of({"rows": [row(10.0, machine=machine)]})
    assert list(found) == ([name] if name else [])


def test_plan_takes_a_measured_share_before_its_own_and_a_given_one_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama(), adapter="longlora", sequence_len=8192)
    monkeypatch.setattr(planned_cost, "MEASURED", tmp_path / "measured.json")
    planned_cost.MEASURED.write_text(json.dumps({"h100-80gb": 0.3}))
    for options, share, origin in (
        (["--gpu", "h100-80gb"], 0.3, "measured"),
        (["--gpu", "a100-80gb"], 0.45, "assumed"),
        (["--gpu", "h100-80gb", "--flops-share", "0.5"], 0.5, "given"),
    ):
        result = invoke(recipe, *options, "--json", tmp_path / "plan.json")
        assert result.exit_code == 0, result.output
        cost = json.loads((tmp_path / "plan.json").read_text())["cost"]
        assert (cost["flops_share"], cost["share_from"]) == (share, origin)
        assert f"TFLOP/s {origin} (--flops-share)" in " ".join(result.output.split())


def test_committed_shares_are_those_of_the_committed_results() -> None:
    results = Path(__file__).parents[2] / "benchmarks/gpu/results.json"
    assert json.loads(planned_cost.MEASURED.read_text()) == gpu_shares.shares_of(
        json.loads(results.read_text())
    )
