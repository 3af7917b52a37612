"""What every preset keeps to: third-party ones, and properties over drawn bases."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_bases import LLAMA2
from rope_families import (
    TINY,
)
from transformers import (
    LlamaConfig,
)

from longlora_plugin import registry
from longlora_plugin.hookspecs import hookimpl
from longlora_plugin.rope import (
    base_context_of,
    resolve_rope,
)

# ---- third-party presets --------------------------------------------------------------------


@pytest.fixture
def third_party():
    class Package:
        answer: object = None

        @hookimpl
        def longlora_rope_presets(self):
            return {"halves": lambda request: self.answer or {"rope_type": "linear", "factor": 2}}

    package = Package()
    registry.manager().register(package, name="halves-package")
    yield package
    registry.manager().unregister(package)


def test_a_third_party_preset_is_found_and_completed_with_the_bases_theta(third_party):
    resolved = resolve_rope("halves", LLAMA2, 8192)
    assert resolved.rope_parameters == {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "answer", ["linear", {"factor": 2}, {"rope_type": 3}, {"rope_type": "linear", "factor": {1}}]
)
def test_a_third_party_preset_that_returns_rubbish_is_named(third_party, answer):
    third_party.answer = answer
    with pytest.raises(ValueError, match="preset 'halves' returned"):
        resolve_rope("halves", LLAMA2, 8192)


# ---- properties -----------------------------------------------------------------------------

SIMPLE = ["linear", "dynamic", "ntk", "yarn", "llama3"]


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(SIMPLE),
    original=st.integers(64, 1 << 17),
    target=st.integers(1, 1 << 20),
    theta=st.floats(1e3, 1e9),
    form=st.sampled_from([dict, SimpleNamespace, LlamaConfig]),
)
def test_any_unscaled_base_and_target(preset, original, target, theta, form):
    fields = {**TINY, "max_position_embeddings": original, "rope_theta": theta}
    base = form(**fields)
    before = copy.deepcopy(base)
    resolved = resolve_rope(preset, base, target)
    assert (base.to_dict() == before.to_dict()) if form is LlamaConfig else (base == before)
    parameters = resolved.rope_parameters
    assert json.loads(json.dumps(parameters)) == parameters
    assert resolved.pretrained_context == original
    assert resolved.extended == (target > original)
    if not resolved.extended:
        assert parameters == {"rope_type": "default", "rope_theta": theta}
        assert resolved.max_position_embeddings == original
        return
    assert parameters["rope_theta"] >= theta
    assert preset == "ntk" or parameters["rope_theta"] == theta
    assert resolved.factor >= target / original
    assert resolved.factor < target / original + 1
    assert parameters.get("original_max_position_embeddings", original) == original
    assert resolved.max_position_embeddings == (original if preset == "dynamic" else target)


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(SIMPLE),
    original=st.integers(64, 1 << 15),
    targets=st.lists(st.integers(64, 1 << 20), min_size=2, max_size=4).map(sorted),
)
def test_extending_a_scaled_base_again_only_grows_it(preset, original, targets):
    base = {**TINY, "max_position_embeddings": original, "rope_theta": 1e4}
    factor, theta = 1.0, 1e4
    for target in targets:
        resolved = resolve_rope(preset, base, target)
        parameters = resolved.rope_parameters
        assert parameters.get("factor", 1.0) >= factor
        assert parameters["rope_theta"] >= theta
        factor, theta = parameters.get("factor", 1.0), parameters["rope_theta"]
        base = {**base, **resolved.config_fields}
        assert base_context_of(base) >= target
        assert not resolve_rope(preset, base, target).extended


# ---- weight of the import -------------------------------------------------------------------


def test_resolving_a_plain_mapping_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from longlora_plugin.rope import resolve_rope;"
        "resolve_rope('yarn', {'max_position_embeddings': 64, 'rope_theta': 1e4}, 128);"
        "assert not {'torch', 'transformers', 'axolotl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
