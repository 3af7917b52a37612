"""Keys of Axolotl that would train or save something else than the recipe says: refused by name.

Each row is one key, what of its values is refused, with which of our features, why, and what to
write instead. `docs/works_with.yml` has every other key, and says how it is known to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longlora_plugin.args import LongLoRAConfig

ALWAYS = "any LongLoRA recipe"
SHIFTED = "shifted attention"
ADAPTER = "an adapter"
OURS = "adapter: longlora"
TRAINED = "adapter: longlora that trains embeddings or norms"
EMBEDDINGS = "adapter: longlora that trains embeddings"
NORMS = "adapter: longlora that trains norms"
NO_SHIFTED = "remove it, or write longlora: {shifted_attention: false}"
REMOVE = "remove it"


def _is_set(value: Any) -> bool:
    return bool(value) and str(value).lower() not in ("false", "no", "off", "0", "none")


def _above_one(value: Any) -> bool:
    try:
        return int(value or 1) > 1
    except (TypeError, ValueError):
        return False  # Axolotl's schema says so


@dataclass(frozen=True)
class Refusal:
    """One row.

    Attributes:
        key: as a recipe writes it; `block.key` where it is inside a block.
        why: what would happen.
        instead: what to write.
        scope: with which of our features.
        wrong: whether a value is refused.
        example: a value that is.
    """

    key: str
    why: str
    instead: str = REMOVE
    scope: str = ALWAYS
    wrong: Callable[[Any], bool] = _is_set
    example: Any = True

    def value_in(self, recipe: Mapping[str, Any]) -> Any:
        value: Any = recipe
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


_BASE_NOT_SAVED = "trains weights of the base model, which are not saved with the adapter"
_BOTH_SIDES = "it trains with attention to later tokens, and shifted attention is causal"
_OWN_ATTENTION = "its kernels are an attention of their own, which shifted attention is not part of"
_UNTRIED = "nobody has tried it together with LongLoRA"

REFUSALS = (
    Refusal(
        "tensor_parallel_size",
        "it gives each GPU a part of the heads and of every trained matrix, and the halves of "
        "heads, embeddings and norms would be taken of the part",
        "write deepspeed: …/zero3.json or fsdp_version: 2 to shard the model",
        wrong=_above_one,
        example=2,
    ),
    Refusal(
        "expert_parallel_size",
        "each process saves its own experts, and embeddings and norms are not gathered",
        "write deepspeed: …/zero3.json or fsdp_version: 2 to shard the model",
        wrong=_above_one,
        example=2,
    ),
    # Axolotl scales scores in its own FlexAttention function, which S² takes the place of in
    # training only: the model would train without the scale and be evaluated with it.
    Refusal("scaling_softmax", "it would apply in evaluation only", NO_SHIFTED, SHIFTED),
    *(
        Refusal(key, _BOTH_SIDES, NO_SHIFTED, SHIFTED)
        for key in ("diffusion", "diffusion_lm", "diffusion_decision")
    ),
    Refusal(
        "rl",
        "it makes attention masks of its own",
        "write longlora: {shifted_attention: false}",
        SHIFTED,
        lambda value: value == "ebft",
        "ebft",
    ),
    Refusal(
        "relora",
        "it trains on a base that each restart changes, which no checkpoint and no adapter holds",
        "remove it and jagged_restart_steps; for a higher rank, raise lora_r",
    ),
    Refusal(
        "gemma4_hybrid_attn_impl",
        _OWN_ATTENTION,
        "remove it, and write attn_implementation: sdpa",
        SHIFTED,
    ),
    Refusal("use_glm_dsa_kernels", _OWN_ATTENTION, NO_SHIFTED, SHIFTED),
    Refusal("use_dsv4_kernels", _OWN_ATTENTION, NO_SHIFTED, SHIFTED),
    Refusal(
        "use_pose",
        "it trains short rows at far positions: RoPE would be scaled to sequence_len instead of "
        "pose_max_context_len, and each jump of positions would be taken for a new document",
        "remove it, and write the context to extend to as sequence_len and longlora: "
        "{attention_pattern: pose}",
    ),
    Refusal("flash_optimum", "it needs optimum's BetterTransformer, which is gone", REMOVE),
    Refusal(
        "reinit_weights",
        "the adapter would be trained on random weights, which are not saved with it",
        "remove it, or train without an adapter",
        ADAPTER,
    ),
    Refusal(
        "fix_untrained_tokens",
        "it changes rows of the base model's embeddings and head, which are not saved with the "
        "adapter",
        "remove it, or train without an adapter",
        ADAPTER,
    ),
    Refusal(
        "peft_layer_replication",
        "the trained model has more layers than the base model, and merge-lora cannot write it",
        scope=ADAPTER,
    ),
    Refusal(
        "unfrozen_parameters",
        f"it freezes LoRA, embeddings and norms, and {_BASE_NOT_SAVED}",
        "remove it (longlora: {trainable: […]} says what trains besides LoRA), or train without an "
        "adapter",
        ADAPTER,
    ),
    Refusal(
        "spectrum_top_fraction",
        f"it freezes LoRA, embeddings and norms, and {_BASE_NOT_SAVED}",
        "remove it, or train without an adapter",
        ADAPTER,
    ),
    *(
        Refusal(
            key,
            "it freezes LoRA in most layers and unfreezes the base model in the rest",
            "remove it, or train without an adapter",
            ADAPTER,
        )
        for key in ("lisa_n_layers", "lisa_step_interval")
    ),
    Refusal(
        "peft_trainable_token_indices",
        "the whole embedding trains already, and PEFT cannot wrap it twice",
        "remove it, or write longlora: {trainable: [norms]}",
        EMBEDDINGS,
    ),
    Refusal(
        "fp32_norms",
        "trained norms are kept in fp32 already, and would be wrapped twice",
        scope=NORMS,
    ),
    Refusal("fp8", _UNTRIED, "write bf16: true", OURS),
    Refusal("gptq", _UNTRIED, "use the unquantized base with load_in_4bit: true", OURS),
    Refusal("qat", _UNTRIED, "quantize the merged model instead", OURS),
    Refusal(
        "tokenizer_use_mistral_common",
        "transformers cannot read the tokenizer that it saves, so no command could read the run",
        "remove it, and name a tokenizer with a tokenizer.json as tokenizer_config",
    ),
    Refusal(
        "use_kernels",
        f"it replaces the norms that are trained by kernels of the hub; {_UNTRIED}",
        scope=OURS,
    ),
    Refusal(
        "optimizer",
        "it knows LoRA's matrices only: embeddings and norms would never train",
        "write optimizer: adamw_torch_fused, or longlora: {trainable: []}",
        TRAINED,
        lambda value: value == "polora",
        "polora",
    ),
    Refusal(
        "optimizer",
        "it leaves out every tensor of one dimension: norms would never train",
        "write optimizer: adamw_torch_fused, or longlora: {trainable: [embeddings]}",
        NORMS,
        lambda value: value == "muon",
        "muon",
    ),
)


def refused(recipe: Mapping[str, Any], block: LongLoRAConfig) -> Iterator[str]:
    """A line for each key of a recipe that is refused."""
    adapter, trains = recipe.get("adapter"), block.trainable
    applies = {
        ALWAYS: True,
        SHIFTED: block.shifted_attention,
        ADAPTER: bool(adapter),
        OURS: adapter == "longlora",
        TRAINED: adapter == "longlora" and bool(trains),
        EMBEDDINGS: adapter == "longlora" and "embeddings" in trains,
        NORMS: adapter == "longlora" and "norms" in trains,
    }
    for row in REFUSALS:
        value = row.value_in(recipe)
        if applies[row.scope] and value is not None and row.wrong(value):
            given = str(value).lower() if isinstance(value, bool) else value
            yield f"{row.key}: {given} does not work with {row.scope}: {row.why}; {row.instead}"
