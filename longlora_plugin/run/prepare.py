"""One decision a run: what a recipe and its base model's config come to.

`prepare_run` is asked once and everyone reads its answer: training, `recipes check`, `doctor`,
`plan` and the evaluations. Everything that can be wrong is found here, before anything is loaded
or written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longlora_plugin.args import LongLoRAConfig, read_block
from longlora_plugin.checkpoints.resume import check_adapter, choose_checkpoint
from longlora_plugin.rope import RopeSettings, resolve_rope, rope_parameters_of
from longlora_plugin.run import checks, context_parallel
from longlora_plugin.run.axolotl_keys import (
    ROPE_KEYS,
    adapter_keys,
    model_config_keys,
    model_config_of,
    resumable_fsdp,
)
from longlora_plugin.run.base_model import check_sizes
from longlora_plugin.run.recipe import asks_for_longlora, sequence_len_of, wrong_kinds

PRECOMPUTES = ("dpo", "ipo")
"""Values of `rl` with which Axolotl reads `precompute_ref_log_probs`."""
OFF = LongLoRAConfig(shifted_attention=False, rope="none", trainable=[])
"""The block of a recipe that does not ask for LongLoRA."""


@dataclass(frozen=True)
class PreparedRun:
    """The decisions of one run.

    Attributes:
        recipe: as the user wrote it.
        base_model: the recipe's.
        adapter: what the recipe asks for: `longlora`, another of Axolotl's, or None.
        block: the `longlora:` block; `OFF` where the recipe does not ask for LongLoRA.
        pretrained_context: tokens of the base model's pretraining; None where that is not known.
        base_context: tokens the base model handles as it is.
        target_context: tokens to extend to; 0 where the recipe's value is no number.
        rope_before: `rope_parameters` of the base model.
        rope: RoPE of the run; None where it cannot be decided.
        group_size: tokens in a group; None where the run trains without S²-Attn.
        context_parallel: GPUs that share a row.
        trainable: kinds of modules trained in addition to LoRA; none but with `adapter: longlora`.
        model_config: every field in which the config of the run's model differs from the base's.
        updates: the keys to write into the recipe for Axolotl.
        problems: what is wrong; the run must not start where there are any.
        warnings: what to know.
    """

    recipe: Mapping[str, Any]
    base_model: str | None
    adapter: str | None
    block: LongLoRAConfig
    pretrained_context: int | None
    base_context: int | None
    target_context: int
    rope_before: Mapping[str, Any]
    rope: RopeSettings | None
    group_size: int | None
    context_parallel: int
    trainable: tuple[str, ...]
    model_config: Mapping[str, Any]
    updates: Mapping[str, Any]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.block.model_dump(exclude_unset=True))

    @property
    def rope_fields(self) -> dict[str, Any]:
        """Fields of config.json that RoPE sets; none where it stays as it is."""
        return dict(self.rope.config_fields) if self.rope and self.rope.extended else {}

    @property
    def built_rope(self) -> dict[str, Any]:
        """Fields that the built model's RoPE must follow; none where it is the base model's."""
        own = self.rope is not None and self.rope.rope_parameters != self.rope_before
        return self.rope_fields or (
            {"rope_parameters": dict(self.rope.rope_parameters)} if self.rope and own else {}
        )

    @property
    def tokenizer(self) -> str:
        """Folder or name of the base model's tokenizer."""
        return str(self.recipe.get("tokenizer_config") or self.base_model)

    @property
    def remote_code(self) -> bool:
        """Whether the code that comes with the model runs."""
        return self.recipe.get("trust_remote_code") is True

    def checked(self) -> PreparedRun:
        """The run itself.

        Raises:
            ValueError: says everything that is wrong with it.
        """
        if self.problems:
            raise ValueError("\n".join(self.problems))
        return self

    def resolved_rope(self) -> RopeSettings:
        """RoPE of the run.

        Raises:
            ValueError: it cannot be decided; says everything that is wrong with the recipe.
        """
        if self.rope is None:
            raise ValueError("\n".join(self.problems) or "RoPE: the base model's config is missing")
        return self.rope

    def config_of(self, base_config: Any) -> Any:
        """The config that the run builds its model with; the base's is not changed."""
        config = copy.deepcopy(base_config)
        for field, value in copy.deepcopy(dict(self.model_config)).items():
            setattr(config, field, value)
        return config


def prepare_run(recipe: Mapping[str, Any], base_config: Any) -> PreparedRun:
    """Decide everything about one run.

    Args:
        recipe: the raw recipe, as YAML gives it; not changed. One that does not ask for LongLoRA
            is prepared as Axolotl alone would run it, and not checked.
        base_config: transformers config of the base model, not changed; None where it cannot be
            read: what needs it is then left open.
    """
    asked, wrong_values = asks_for_longlora(recipe), wrong_kinds(recipe)
    recipe = {key: value for key, value in recipe.items() if key not in wrong_values}
    block, problems = read_block(recipe.get("longlora")) if asked else (OFF, [])
    problems += wrong_values.values()
    sequence_len = 0
    with checks.told_in(problems):
        sequence_len = sequence_len_of(recipe)
    group_size: int | None = None
    rope_before = {} if base_config is None else rope_parameters_of(base_config)
    rope, overrides, wrong = _rope(recipe, block, base_config, sequence_len)
    if asked:
        if sequence_len:
            problems += checks.problems_of(recipe, block, base_config, sequence_len)
        problems += wrong
    with suppress(ValueError):  # one of the problems
        group_size = block.group_size_for(sequence_len) if block.shifted_attention else None
    updates, warnings = _updates(recipe, block, problems) if asked else ({}, [])
    processes = 1
    if asked:
        parameters = rope.rope_parameters if rope else rope_before
        processes, shared = _shared_rows(recipe, block, parameters, problems)
        updates |= shared
    if group_size:
        about = context_parallel.group_warning(group_size, sequence_len, processes)
        warnings += [about] if about else []
        block = _with_full_steps(recipe, block, warnings)
    if overrides and asked and "overrides_of_model_config" in recipe:
        updates |= model_config_keys(recipe, {})  # an empty model_config would win
    if rope is not None and rope.extended:
        updates |= model_config_keys(recipe, rope.config_fields)
        overrides |= rope.config_fields
    elif rope is not None and block.rope_preset != "none":
        warnings.insert(0, _not_extended(recipe, sequence_len, rope, group_size))
    return PreparedRun(
        recipe=copy.deepcopy(dict(recipe)),
        base_model=recipe.get("base_model"),
        adapter=recipe.get("adapter"),
        block=block,
        pretrained_context=rope.pretrained_context if rope else None,
        base_context=rope.base_context if rope else None,
        target_context=sequence_len,
        rope_before=rope_before,
        rope=rope,
        group_size=group_size,
        context_parallel=processes,
        trainable=tuple(block.trainable) if recipe.get("adapter") == "longlora" else (),
        model_config=overrides,
        updates=updates,
        problems=tuple(dict.fromkeys(problems)),
        warnings=tuple(warnings),
    )


def _with_full_steps(
    recipe: Mapping[str, Any], block: LongLoRAConfig, warnings: list[str]
) -> LongLoRAConfig:
    """The block with the full steps that the run can have."""
    precomputes = recipe.get("precompute_ref_log_probs") and recipe.get("rl") in PRECOMPUTES
    if not precomputes or not block.full_attention_steps:
        return block
    warnings.append(
        "precompute_ref_log_probs: the reference is computed once, with the attention of the "
        f"first steps, so no step changes to full attention: full_attention_steps: "
        f"{block.full_attention_steps:g} becomes 0"
    )
    return block.model_copy(update={"full_attention_steps": 0.0})


def _rope(
    recipe: Mapping[str, Any], block: LongLoRAConfig, base_config: Any, sequence_len: int
) -> tuple[RopeSettings | None, dict[str, Any], list[str]]:
    """RoPE, the recipe's own overrides of the model's config, and what is wrong with either."""
    problems: list[str] = []
    own: dict[str, Any] = {}
    rope = None
    with checks.told_in(problems):
        own = model_config_of(recipe)
        check_sizes(own, "model_config.")
        if base_config is not None and sequence_len:
            config = copy.deepcopy(base_config)
            _override(config, {key: own[key] for key in own if key not in ROPE_KEYS})
            rope = resolve_rope(
                block.rope_preset,
                config,
                sequence_len,
                original_context=block.original_context,
                **block.rope_options,
            )
            checks.check_rope_can_be_written(recipe, base_config, rope)
            if block.rope_preset == "none" and own.keys() & set(ROPE_KEYS):
                _override(config, own)
                rope = replace(rope, rope_parameters=rope_parameters_of(config))
    with checks.told_in(problems):
        checks.check_rope_is_ours(recipe, block, rope)
    return (None if problems else rope), own, problems


def _override(config: Any, fields: Mapping[str, Any]) -> None:
    """Set fields of a transformers config.

    Raises:
        ValueError: its class, or a field's present value, says that it cannot be one.
    """
    for field, value in fields.items():
        before = getattr(config, str(field), None)
        try:
            if isinstance(value, str) and isinstance(before, int | float):
                raise TypeError(f"the base model has {before}")
            setattr(config, field, copy.deepcopy(value))
        except Exception as error:
            why = " ".join(str(error).split())
            raise ValueError(f"model_config.{field}: got {value!r}: {why}") from None


def _updates(
    recipe: Mapping[str, Any], block: LongLoRAConfig, problems: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """The keys for Axolotl besides RoPE, and warnings."""
    updates: dict[str, Any] = {}
    warnings: list[str] = []
    with checks.told_in(problems):
        check_adapter(recipe.get("lora_model_dir"))
        updates, warnings = choose_checkpoint(
            Path(recipe.get("output_dir") or "./model-out"),
            named=recipe.get("resume_from_checkpoint"),
            newest=bool(recipe.get("auto_resume_from_checkpoints")),
            weights_only=bool(recipe.get("save_only_model")),
            adapter=bool(recipe.get("adapter")),
        )
    if recipe.get("adapter") == "longlora":
        updates.update(adapter_keys(recipe))
        if block.trainable:
            warnings += _rates(recipe)
    finishes = block.shifted_attention and block.full_attention_steps
    if finishes and recipe.get("early_stopping_patience"):
        warnings.append(
            f"early_stopping_patience: {recipe['early_stopping_patience']} may end the run "
            "before its last steps, which are those that train with full attention "
            f"(longlora.full_attention_steps: {finishes})"
        )
    if recipe.get("adapter"):
        fsdp_keys, changes = resumable_fsdp(recipe)
        updates |= fsdp_keys
        warnings += changes
    return updates, warnings


def _rates(recipe: Mapping[str, Any]) -> list[str]:
    """What Axolotl's learning rates for groups of tensors mean for embeddings and norms."""
    if recipe.get("loraplus_lr_ratio"):
        return [
            "loraplus_lr_ratio counts norms to its fast group (every one-dimensional tensor): "
            f"they train at {recipe['loraplus_lr_ratio']} × learning_rate, embeddings at "
            "learning_rate, and embedding_lr is not read"
        ]
    if not recipe.get("lr_groups"):
        return []
    scale, rate = recipe.get("embedding_lr_scale"), recipe.get("embedding_lr")
    trained_at = f"{scale} × learning_rate" if scale else rate or "learning_rate"
    return [
        "lr_groups reaches LoRA's matrices only: Axolotl counts every module that is trained in "
        f"full to the embeddings, so embeddings and norms train at {trained_at}; write embedding_lr"
    ]


def _shared_rows(
    recipe: Mapping[str, Any],
    block: LongLoRAConfig,
    rope_parameters: Mapping[str, Any],
    problems: list[str],
) -> tuple[int, dict[str, Any]]:
    """How many GPUs share a row, and the keys for Axolotl."""
    nested = [each for each in rope_parameters.values() if isinstance(each, Mapping)]
    types = {each.get("rope_type") for each in nested or [rope_parameters]}
    with checks.told_in(problems):
        processes = context_parallel.context_parallel_size(recipe)
        problems += context_parallel.problems_of(recipe, block, types)
        return processes, context_parallel.updates_of(recipe)
    return 1, {}


def _not_extended(
    recipe: Mapping[str, Any], sequence_len: int, rope: RopeSettings, group_size: int | None
) -> str:
    return (
        f"sequence_len {sequence_len} is not above the {rope.base_context} tokens that "
        f"{recipe.get('base_model')} already handles: RoPE stays as it is, nothing is extended"
        + (" (S²-Attn still runs)" if group_size else "")
    )
