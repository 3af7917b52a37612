"""Axolotl's hooks. Each asks whether the recipe wants LongLoRA, calls one room, and logs a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from longlora_plugin.args import CarriedRun
from longlora_plugin.artifacts.manifest import read_manifest
from longlora_plugin.host.compat import (
    BasePlugin,
    RecipeError,
    is_duplicate_instance,
    is_main_process,
    log,
    merge_with,
    merges_base_stored_as,
    quantization_of_run,
    quantizes_as_only_axolotl_can,
    save_fsdp2_adapters_with,
    uses_deepspeed,
    uses_fsdp,
)
from longlora_plugin.rope import check_built_rope, keep_both_spellings
from longlora_plugin.run.base_model import base_config_of
from longlora_plugin.run.manifest import check_same_rope, manifest_of
from longlora_plugin.run.prepare import PreparedRun, asks_for_longlora, prepare_run


class LongLoRAPlugin(BasePlugin):
    """Long-context fine-tuning: S²-Attn, LoRA with trainable embeddings and norms, RoPE scaling.

    Inert unless the recipe says `adapter: longlora` or has a `longlora:` block.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []  # a reference model has one, too
        self._wanted: list[str] = []
        self._whole_adapters: Any = None
        self._artifacts: Any = None
        self._trained: Any = None
        self._undo: list[Callable[[], None]] = []

    def get_input_args(self) -> str | None:
        return None if is_duplicate_instance(self) else "longlora_plugin.args.LongLoRAArgs"

    def register(self, cfg: Any) -> None:
        """Decide the run and write it into the recipe; nothing is loaded before this passes."""
        if is_duplicate_instance(self) or _carried(cfg) or not asks_for_longlora(cfg):
            return
        try:
            recipe = cfg.to_dict()
            base = base_config_of(recipe)
            if cfg.get("merge_lora"):
                _check_merge(cfg)
                merge_with(_merge)
            run = prepare_run(recipe, base).checked()
            _check_start(cfg, run)
            if run.block.held_out and not (cfg.get("merge_lora") or cfg.get("inference")):
                _check_held_out(recipe, run)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        for key, value in {**run.updates, "longlora": CarriedRun(run)}.items():
            cfg[key] = value
        for warning in run.warnings:
            log.warning("LongLoRA: %s", warning)

    def pre_model_load(self, cfg: Any) -> None:
        run = self._run(cfg)
        if run is None or run.rope is None:
            return
        if run.rope_fields:
            log.info(
                "LongLoRA RoPE: %s%s, %s → %s, context %d → %d",
                run.rope.preset,
                f" (auto: {run.rope.chosen_by_auto})" if run.rope.chosen_by_auto else "",
                run.rope_before,
                run.rope.rope_parameters,
                run.base_context,
                run.target_context,
            )
        else:
            log.info("LongLoRA RoPE: unchanged, %s", run.rope_before)

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Name the modules to train, now that the model says which they are."""
        run = self._run(cfg)
        if run is None or run.adapter != "longlora":
            return
        if cfg.seed is not None:
            from transformers import set_seed

            # Axolotl 0.19 draws LoRA's first values unseeded: two runs of one recipe would differ.
            set_seed(cfg.seed)
        from longlora_plugin.adapter import modules
        from longlora_plugin.registry import find

        self._wanted = names = [
            name
            for kind in run.trainable
            for name in find("longlora_trainable_modules", kind)(model)
        ]
        if names:
            own = list(cfg.lora_modules_to_save or [])
            chosen = modules.shortest_names(model, names)
            cfg.lora_modules_to_save = own + [name for name in chosen if name not in own]
            if "embeddings" in run.trainable and modules.embeddings_are_tied(model):
                cfg.peft_ensure_weight_tying = True
        if cfg.lora_target_modules and not _any_module_named(model, cfg.lora_target_modules):
            cfg.lora_target_modules = modules.attention_projections(model)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        run = self._run(cfg)
        if run is None:
            return
        _check_rope(run, model)
        # Axolotl 0.19 raises the maximum of the built model, which switches `dynamic` off.
        for field, value in run.rope_fields.items():
            setattr(model.config, field, value)
        keep_both_spellings(model.config)
        if cfg.merge_lora or cfg.inference:
            return
        if run.adapter == "longlora":
            self._trained = trained = self._prepare_adapter(cfg, model)
            log.info(
                "LongLoRA trains %d modules beside LoRA (%s): %s parameters, kept in %s, "
                "computing in %s",
                trained.modules,
                ", ".join(run.trainable) or "none",
                f"{trained.parameters:,}",
                trained.dtype,
                trained.compute_dtype,
            )
        if run.group_size:
            from longlora_plugin.attention import enable_shifted_attention
            from longlora_plugin.registry import find

            try:
                handle = enable_shifted_attention(
                    model,
                    group_size=run.group_size,
                    full_attention_below=run.full_attention_below,
                    pattern=find("longlora_attention_patterns", run.attention_pattern),
                )
            except ValueError as error:
                raise RecipeError(str(error)) from error
            self._handles.append(handle)
            skipped = "; ".join(f"{count} × {reason}" for reason, count in handle.skipped.items())
            log.info(
                "LongLoRA shifted attention (%s): %d layers, group size %d of %d tokens%s",
                run.attention_pattern,
                handle.layers,
                handle.group_size,
                run.target_context,
                f"; full attention in {skipped}" if skipped else "",
            )

    def _prepare_adapter(self, cfg: Any, model: Any) -> Any:
        from longlora_plugin.adapter import fp32_weights, modules, state, zero3

        untrained = modules.untrained_modules(model, self._wanted)
        if untrained:
            reason = (
                f"lora_model_dir: {cfg.lora_model_dir} was made without them"
                if cfg.lora_model_dir
                else f"rl: {cfg.rl} attaches the adapter later, without them"
            )
            raise RecipeError(
                f"longlora: {{trainable: …}} asks for {len(untrained)} modules that would not "
                f"train ({', '.join(untrained[:3])}, …): {reason}. Write "
                "longlora: {trainable: []}, or start without it"
            )
        trained = fp32_weights.train_in_fp32(model)
        if uses_deepspeed(cfg):
            self._undo.append(zero3.ZeRO3HookGuard().install().remove)
        elif cfg.lora_model_dir:
            # PEFT loaded them into copies in the base's dtype, which rounds them.
            try:
                state.load_adapter_state(model, state.read_adapter_state(cfg.lora_model_dir))
            except ValueError as error:
                raise RecipeError(f"lora_model_dir: {cfg.lora_model_dir}: {error}") from error
        if uses_fsdp(cfg):
            self._undo.append(save_fsdp2_adapters_with(state.save_adapter))
        return trained

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        run = self._run(cfg)
        callbacks: list[Any] = []
        if run is None:
            return callbacks
        _raise_limits(trainer, run, base_config_of(cfg))
        callbacks.append(self._save_artifacts(run, trainer))
        if self._handles:
            from longlora_plugin.attention.schedule import AttentionSchedule

            callbacks.append(
                AttentionSchedule(
                    self._handles,
                    run.block.full_attention_steps_of,
                    lambda line: log.info("LongLoRA: %s", line),
                )
            )
        if run.adapter == "longlora" and (uses_deepspeed(cfg) or uses_fsdp(cfg)):
            from longlora_plugin.adapter.callback import SaveWholeAdapter

            deepspeed = uses_deepspeed(cfg)
            self._whole_adapters = SaveWholeAdapter(
                trainer.model,
                saved_by_peft=deepspeed,
                start_from=cfg.lora_model_dir if deepspeed else None,
            )
            callbacks.append(self._whole_adapters)
        if run.block.held_out:
            from longlora_plugin.evaluation.callback import watch_held_out

            callbacks.append(
                watch_held_out(
                    run.block.held_out,
                    trainer.processing_class,
                    length=run.target_context,
                    base_context=run.base_context,
                    every_steps=run.block.held_out_steps,
                    base_config=base_config_of(cfg),
                    continues_adapter=bool(cfg.lora_model_dir),
                    log=trainer.log,
                )
            )
        return callbacks

    def _save_artifacts(self, run: PreparedRun, trainer: Any) -> Any:
        from longlora_plugin.artifacts.callback import SaveArtifacts

        manifest = manifest_of(run, run.recipe)
        if self._handles:
            manifest = replace(
                manifest,
                covered_layers=self._handles[0].layers,
                uncovered_layers=dict(self._handles[0].skipped),
            )
        if self._trained is not None:
            manifest = replace(
                manifest,
                trained_modules=self._trained.modules,
                trained_parameters=self._trained.parameters,
            )
        self._artifacts = SaveArtifacts(manifest, run.block.full_attention_steps_of)
        self._artifacts.watch(trainer)
        return self._artifacts

    def post_train_unload(self, cfg: Any) -> None:
        if self._artifacts is not None:
            if is_main_process():
                self._artifacts.finish(Path(cfg.output_dir))
            self._artifacts = None
        if self._whole_adapters is not None:
            self._whole_adapters.finish(Path(cfg.output_dir))
            self._whole_adapters = None
        while self._handles:
            self._handles.pop().remove()
        while self._undo:
            self._undo.pop()()

    def _run(self, cfg: Any) -> PreparedRun | None:
        if is_duplicate_instance(self) or not asks_for_longlora(cfg):
            return None
        run = _carried(cfg)
        if run is None:
            raise RecipeError(
                "this recipe asks for LongLoRA but was validated without the plugin's register; "
                "load it with axolotl.cli.config.load_cfg, or call prepare_plugins(cfg) first"
            )
        return run


def _check_rope(run: PreparedRun, model: Any) -> None:
    if not run.rope_fields:
        return
    try:
        compared = check_built_rope(model, run.rope_fields)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not compared:
        log.warning(
            "LongLoRA RoPE: this model's rotary embeddings are not transformers' own, so whether "
            "they were scaled could not be checked"
        )


def _carried(cfg: Any) -> PreparedRun | None:
    carried = cfg.get("longlora")
    return carried.run if isinstance(carried, CarriedRun) else None


def _check_start(cfg: Any, run: PreparedRun) -> None:
    """Refuse to go on from weights, or to merge an adapter, of another RoPE."""
    starts = ["lora_model_dir", "resume_from_checkpoint"]
    folders = {key: run.updates.get(key) or cfg.get(key) for key in starts}
    if cfg.get("merge_lora") and not folders["lora_model_dir"]:
        folders = {"output_dir": cfg.get("output_dir")}
    for key, folder in folders.items():
        if folder and Path(str(folder)).is_dir():
            check_same_rope(str(folder), run, key)


def _check_held_out(recipe: dict[str, Any], run: PreparedRun) -> None:
    from longlora_plugin.evaluation.data import check_held_out

    try:
        check_held_out(
            str(run.block.held_out),
            run.target_context,
            str(recipe.get("tokenizer_config") or recipe["base_model"]),
            trust_remote_code=recipe.get("trust_remote_code") is True,
        )
    except ValueError as error:
        raise ValueError(f"longlora.held_out: {error}") from error


def _any_module_named(model: Any, targets: Any) -> bool:
    if isinstance(targets, str):
        return True  # a regular expression, PEFT's to judge
    return any(name.rsplit(".", 1)[-1] in targets for name, _ in model.named_modules())


def _raise_limits(trainer: Any, run: PreparedRun, base: Any) -> None:
    """Limits that the run saves with tokenizer and model must not repeat the base's context."""
    from longlora_plugin.merge.limits import raise_limits_of
    from longlora_plugin.rope.base_config import maximum_of, text_config_of

    before, trained = (
        maximum_of(text_config_of(config)) or 0 for config in (base, trainer.model.config)
    )
    raise_limits_of(
        trainer.processing_class,
        getattr(trainer.model, "generation_config", None),
        {run.pretrained_context or 0, run.base_context or 0, before},
        max(trained, run.target_context if run.rope_fields else 0),
    )


def _check_merge(cfg: Any) -> None:
    from longlora_plugin.merge.checks import check_adapter_folder

    if not cfg.adapter:
        raise ValueError(
            "merge-lora: this recipe has no adapter: training it writes the whole model to "
            f"output_dir ({cfg.output_dir}), which is the result; there is nothing to merge"
        )
    check_adapter_folder(Path(cfg.lora_model_dir or cfg.output_dir or "./model-out"))


def _merge(cfg: Any, weights: Callable[[Path], None]) -> Path | None:
    """Merge an adapter; `weights` lets Axolotl write the weights of a base that only it knows."""
    run = _carried(cfg)
    if run is None:
        return None
    from longlora_plugin.merge import checks, folder

    base = base_config_of(cfg)
    stored = checks.quantization_method(base)
    by_axolotl = stored is not None or quantizes_as_only_axolotl_can(cfg)
    target = Path(cfg.output_dir) / "merged"
    try:
        checks.check_not_quantized(
            cfg.base_model, base, merges_base_stored_as(stored, cfg.merge_method)
        )
        source = folder.Source(
            adapter_dir=Path(cfg.lora_model_dir),
            base_dir=checks.local_folder(cfg.base_model, cfg.revision_of_model),
            base_config=base,
            recipe={**run.model_config, **run.rope_fields},
            base_contexts=(run.pretrained_context or 0, run.base_context or 0),
            target_context=run.target_context if run.rope_fields else None,
            quantization=None if by_axolotl else quantization_of_run(cfg),
            remote_code=bool(cfg.trust_remote_code),
        )
        notes = folder.merge(source, target, weights=weights if by_axolotl else None)
    except ValueError as error:
        raise RecipeError(f"merge-lora: {error}") from error
    from longlora_plugin.artifacts.callback import finish_merged

    finish_merged(target, read_manifest(source.adapter_dir) or manifest_of(run, run.recipe))
    for note in notes:
        log.info("LongLoRA merge: %s", note)
    log.info("LongLoRA merge: %s is complete and loads", target)
    return target
