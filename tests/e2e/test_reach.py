"""What a run leaves needs nothing of this package: base + adapter through stock PEFT, and the
merged folder alone, generate beyond the original context in a process that cannot import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from axolotl_runs import CONTEXT, TARGET, make_adapter, merge_lora, write_recipe
from transformers import AutoConfig

from longlora_plugin.rope import apply_rope, resolve_rope

PRESETS = ("linear", "yarn", "ntk")
PROMPT, NEW = 3 * CONTEXT // 2, 24

STRANGER = """
import importlib.abc, json, sys

class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("longlora_plugin", "axolotl"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Guard())
try:
    import longlora_plugin
    raise SystemExit("the guard does not work")
except ModuleNotFoundError:
    pass

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

base, prompt, new, cases = json.loads(sys.argv[1])
tokens = torch.arange(3, 3 + prompt)[None] % 300

def generate(model, cache):
    with torch.no_grad():
        out = model.eval().generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
            min_new_tokens=new, do_sample=False, use_cache=cache,
        )
    return out[0, prompt:].tolist()

def with_adapter(folder, config):
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder)

answers = {}
for name, (adapter, merged) in cases.items():
    peft = with_adapter(adapter, AutoConfig.from_pretrained(adapter))
    alone = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    unscaled = with_adapter(adapter, AutoConfig.from_pretrained(base))
    answers[name] = {
        "adapter": [generate(peft, True), generate(peft, False)],
        "merged": [generate(alone, True), generate(alone, False)],
        "unscaled": generate(unscaled, True),
        "context": alone.config.max_position_embeddings,
    }
assert not [name for name in sys.modules if name.split(".")[0] in ("longlora_plugin", "axolotl")]
print("ANSWERS " + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tiny_model_dir):
    root = tmp_path_factory.mktemp("reach")
    base = tiny_model_dir("reach", initializer_range=0.2)
    cases = {}
    for preset in PRESETS:
        adapter = root / preset / "out"
        make_adapter(base, adapter)
        config = AutoConfig.from_pretrained(base)
        apply_rope(config, resolve_rope(preset, AutoConfig.from_pretrained(base), TARGET))
        config.save_pretrained(adapter)
        recipe = write_recipe(root / preset, base, root / "none", longlora={"rope": preset})
        cases[preset] = (str(adapter), str(merge_lora(recipe)))
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps([str(base), PROMPT, NEW, cases])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(each for each in done.stdout.splitlines() if each.startswith("ANSWERS "))
    return json.loads(line.removeprefix("ANSWERS "))


@pytest.mark.parametrize("preset", PRESETS)
def test_generation_beyond_the_old_context_is_the_same_with_and_without_cache(answers, preset):
    answer = answers[preset]
    for result in ("adapter", "merged"):
        cached, uncached = answer[result]
        assert len(cached) == NEW
        assert cached == uncached
    assert answer["context"] == TARGET


@pytest.mark.parametrize("preset", PRESETS)
def test_merged_folder_alone_says_what_the_adapter_says(answers, preset):
    assert answers[preset]["merged"][0] == answers[preset]["adapter"][0]


def test_answers_depend_on_the_scaled_rope(answers):
    """So that the tests above would see a config that is not used."""
    said = [tuple(answers[preset]["merged"][0]) for preset in PRESETS]
    assert len(set(said)) == len(PRESETS)
    assert tuple(answers["linear"]["unscaled"]) not in said
