"""Stock Axolotl recipes with two lines added: each still validates, and becomes LongLoRA.

The recipes are written the way Axolotl's own examples are, for LoRA and QLoRA. Only the `plugins`
line and `adapter: longlora` differ from the stock recipe; every other key must come out of
Axolotl's validation as it does without us.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import base_configs
import pytest
import yaml

from longlora_plugin.host.schema import check_schema
from longlora_plugin.recipes.check import ASSUMED_GPU, PLUGIN, capabilities_of, check_recipe
from longlora_plugin.run import prepare
from longlora_plugin.run.base_model import base_config_of

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stock:
    """A stock recipe and what it has to become.

    Attributes:
        yaml: the recipe as its author wrote it; `base_model` is completed by the test.
        adapter: what Axolotl gets.
        extends: from and to how many tokens; None where the base already covers sequence_len.
        rope: rope_type and factor after; the base's own where nothing is extended.
        group: group size.
        gpus: GPUs the recipe is for.
    """

    yaml: str
    adapter: str
    extends: tuple[int, int] | None
    rope: dict[str, Any]
    group: int
    gpus: int = 1
    lora: dict[str, Any] = field(default_factory=dict)


LINEAR = {"rope_type": "linear"}

RECIPES = {
    "llama-2 qlora, packed alpaca": Stock(
        """
base_model: meta-llama/Llama-2-7b-hf
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 16384
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "</s>"
""",
        adapter="qlora",
        extends=(4096, 16384),
        rope={**LINEAR, "factor": 4.0},
        group=4096,
        lora={"lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True},
    ),
    "llama-2 lora in 8 bits": Stock(
        """
base_model: meta-llama/Llama-2-7b-hf
load_in_8bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
val_set_size: 0.05
adapter: lora
sequence_len: 8192
eval_sample_packing: false
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
""",
        adapter="lora",
        extends=(4096, 8192),
        rope={**LINEAR, "factor": 2.0},
        group=2048,
        lora={"lora_r": 32},
    ),
    "llama-3 lora, chat template": Stock(
        """
base_model: meta-llama/Meta-Llama-3-8B
chat_template: llama3
datasets:
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
    roles:
      user: [user]
      assistant: [assistant]
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 32768
sample_packing: true
lora_r: 64
lora_alpha: 32
lora_dropout: 0.0
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 2
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
attn_implementation: flash_attention_2
special_tokens:
  pad_token: <|end_of_text|>
""",
        adapter="lora",
        extends=(8192, 32768),
        rope={**LINEAR, "factor": 4.0},
        group=8192,
        lora={"lora_r": 64},
    ),
    "llama-3.1 qlora, fsdp2": Stock(
        """
base_model: meta-llama/Llama-3.1-8B
load_in_4bit: true
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
adapter: qlora
sequence_len: 8192
sample_packing: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_fused
learning_rate: 0.00001
bf16: true
attn_implementation: flash_attention_2
fsdp_version: 2
fsdp_config:
  offload_params: true
  cpu_ram_efficient_loading: false
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: LlamaDecoderLayer
  state_dict_type: SHARDED_STATE_DICT
  reshard_after_forward: true
  activation_checkpointing: true
special_tokens:
  pad_token: <|finetune_right_pad_id|>
""",
        adapter="qlora",
        extends=None,
        rope={"rope_type": "llama3", "factor": 8.0},
        group=2048,
        gpus=2,
        lora={"lora_r": 8},
    ),
    "llama-3.2-1b qlora, tied embeddings": Stock(
        """
base_model: meta-llama/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
adapter: qlora
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
special_tokens:
  pad_token: "<|end_of_text|>"
""",
        adapter="qlora",
        extends=None,
        rope={"rope_type": "llama3", "factor": 32.0},
        group=512,
    ),
    "code-llama lora": Stock(
        """
base_model: NousResearch/CodeLlama-7b-hf
tokenizer_type: CodeLlamaTokenizer
load_in_8bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
adapter: lora
sequence_len: 65536
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
special_tokens:
  bos_token: "<s>"
  eos_token: "</s>"
  unk_token: "<unk>"
""",
        adapter="lora",
        extends=(16384, 65536),
        rope={**LINEAR, "factor": 4.0},
        group=16384,
    ),
    "mistral lora, deepspeed zero-2": Stock(
        """
base_model: mistralai/Mistral-7B-v0.3
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
val_set_size: 0.1
adapter: lora
sequence_len: 65536
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_fused
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
deepspeed: deepspeed_configs/zero2.json
""",
        adapter="lora",
        extends=(32768, 65536),
        rope={**LINEAR, "factor": 2.0},
        group=16384,
        gpus=4,
    ),
    "mixtral qlora, expert router left alone": Stock(
        """
base_model: mistralai/Mixtral-8x7B-v0.1
load_in_4bit: true
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
adapter: qlora
sequence_len: 65536
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
gradient_accumulation_steps: 2
micro_batch_size: 1
num_epochs: 1
optimizer: paged_adamw_8bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
""",
        adapter="qlora",
        extends=(32768, 65536),
        rope={**LINEAR, "factor": 2.0},
        group=16384,
    ),
    "qwen2.5 lora, chat template and liger": Stock(
        """
base_model: Qwen/Qwen2.5-7B-Instruct
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rope: true
liger_rms_norm: true
liger_glu_activation: true
liger_fused_linear_cross_entropy: true
chat_template: qwen_25
datasets:
  - path: mlabonne/FineTome-100k
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
val_set_size: 0.0
adapter: lora
sequence_len: 131072
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, down_proj, up_proj]
gradient_accumulation_steps: 2
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_fused
learning_rate: 0.0002
bf16: auto
tf32: true
gradient_checkpointing: true
attn_implementation: flash_attention_2
""",
        adapter="lora",
        extends=(32768, 131072),
        rope={**LINEAR, "factor": 4.0},
        group=32768,
    ),
    "qwen3 qlora with its own lora kernels": Stock(
        """
base_model: Qwen/Qwen3-8B-Base
load_in_4bit: true
chat_template: qwen3
datasets:
  - path: mlabonne/FineTome-100k
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
adapter: qlora
sequence_len: 65536
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, down_proj, up_proj]
lora_mlp_kernel: true
lora_qkv_kernel: true
lora_o_kernel: true
gradient_accumulation_steps: 2
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_4bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
activation_offloading: true
attn_implementation: flash_attention_2
""",
        adapter="qlora",
        extends=(32768, 65536),
        rope={**LINEAR, "factor": 2.0},
        group=16384,
    ),
    "gemma-2 qlora, layers with a window": Stock(
        """
base_model: google/gemma-2-2b
load_in_4bit: true
chat_template: gemma
datasets:
  - path: cgato/SlimOrcaDedupCleaned
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
adapter: qlora
sequence_len: 16384
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
attn_implementation: eager
""",
        adapter="qlora",
        extends=(8192, 16384),
        rope={**LINEAR, "factor": 2.0},
        group=4096,
    ),
    "phi-2 lora, partial rotary": Stock(
        """
base_model: microsoft/phi-2
datasets:
  - path: garage-bAInd/Open-Platypus
    type: alpaca
val_set_size: 0.05
adapter: lora
sequence_len: 8192
sample_packing: true
lora_r: 64
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch_fused
adam_beta2: 0.95
adam_epsilon: 0.00001
max_grad_norm: 1.0
learning_rate: 0.000003
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
resize_token_embeddings_to_32x: true
special_tokens:
  pad_token: "<|endoftext|>"
""",
        adapter="lora",
        extends=(2048, 8192),
        rope={**LINEAR, "factor": 4.0, "partial_rotary_factor": 0.4},
        group=2048,
    ),
    "pythia lora, fused projections": Stock(
        """
base_model: EleutherAI/pythia-1.4b
load_in_8bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.05
adapter: lora
sequence_len: 4096
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - query_key_value
gradient_accumulation_steps: 1
micro_batch_size: 4
num_epochs: 4
learning_rate: 0.00001
bf16: auto
tf32: true
attn_implementation: sdpa
""",
        adapter="lora",
        extends=(2048, 4096),
        rope={**LINEAR, "factor": 2.0, "partial_rotary_factor": 0.25},
        group=1024,
        lora={"lora_target_modules": ["query_key_value"]},
    ),
    "llama-2-70b lora, deepspeed zero-3, completion": Stock(
        """
base_model: meta-llama/Llama-2-70b-hf
datasets:
  - path: togethercomputer/RedPajama-Data-1T-Sample
    type: completion
    field: text
adapter: lora
sequence_len: 32768
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
gradient_accumulation_steps: 8
micro_batch_size: 1
max_steps: 1000
optimizer: adamw_torch
learning_rate: 0.00001
lr_scheduler: constant_with_warmup
warmup_steps: 20
bf16: true
gradient_checkpointing: true
attn_implementation: flash_attention_2
deepspeed: examples/configs/deepspeed/zero3.json
""",
        adapter="lora",
        extends=(4096, 32768),
        rope={**LINEAR, "factor": 8.0},
        group=8192,
        gpus=8,
    ),
}
OURS = {"plugins", "longlora", "adapter", "model_config", "overrides_of_model_config"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(stock: Stock, root: Path) -> dict[str, Any]:
    raw = yaml.safe_load(stock.yaml)
    raw["base_model"] = str(base_configs.write(raw["base_model"], root))
    return raw


def with_our_two_lines(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "plugins": [*(raw.get("plugins") or []), PLUGIN], "adapter": "longlora"}


def test_there_are_a_dozen_of_different_kinds():
    text = " ".join(stock.yaml for stock in RECIPES.values())
    assert len(RECIPES) >= 12
    for kind in (
        *("sample_packing: true", "chat_template:", "deepspeed:", "fsdp_version: 2", "liger_"),
        *("load_in_4bit: true", "load_in_8bit: true", "type: completion", "attn_implementation"),
    ):
        assert kind in text
    families = {yaml.safe_load(stock.yaml)["base_model"] for stock in RECIPES.values()}
    assert len({base_configs.CONFIGS[name]["model_type"] for name in families}) >= 7


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_two_lines_make_a_stock_recipe_longlora_and_change_nothing_else(name, tmp_path):
    stock = RECIPES[name]
    raw = read(stock, tmp_path)
    capabilities = capabilities_of(ASSUMED_GPU, stock.gpus)
    before = check_schema(copy.deepcopy(raw), capabilities)
    assert before.problems == []  # it is a right recipe without us

    ours = with_our_two_lines(raw)
    run = prepare.prepare_run(ours, base_config_of(ours)).checked()
    block = run.block.model_dump(exclude_none=True)
    after = check_schema({**ours, **run.updates, "longlora": block}, capabilities)
    assert (after.problems, after.unknown) == ([], {})

    changed = {
        key
        for key in {*before.config, *after.config} - OURS
        if before.config.get(key) != after.config.get(key)
    }
    assert changed == set()
    assert after.config["adapter"] == stock.adapter
    for key, value in stock.lora.items():
        assert after.config[key] == value

    assert run.adapter == "longlora"
    assert run.group_size == stock.group
    assert stock.rope.items() <= run.rope.rope_parameters.items()
    written = after.config.get("overrides_of_model_config") or {}
    if stock.extends is None:
        assert written == {}
    else:
        assert (run.base_context, run.target_context) == stock.extends
        assert written["rope_parameters"] == run.rope.rope_parameters
        assert written["max_position_embeddings"] == stock.extends[1]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_stock_recipe_with_our_two_lines_passes_the_check(name, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(with_our_two_lines(read(RECIPES[name], tmp_path))))
    assert check_recipe(path, gpus=RECIPES[name].gpus).problems == []


def test_without_our_lines_the_installed_plugin_leaves_a_stock_recipe_alone(tmp_path):
    raw = read(RECIPES["llama-3 lora, chat template"], tmp_path)
    assert not prepare.asks_for_longlora(raw)
    loaded = {**raw, "plugins": [PLUGIN]}
    capabilities = capabilities_of(ASSUMED_GPU, 1)
    before = check_schema(copy.deepcopy(raw), capabilities).config
    after = check_schema(copy.deepcopy(loaded), capabilities).config
    assert after.pop("plugins") == [PLUGIN]
    assert after == before
