"""Axolotl's hooks. Each asks whether the recipe wants LongLoRA, and calls what does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from longlora_plugin.args import CarriedRun
from longlora_plugin.host.compat import (
    BasePlugin,
    RecipeError,
    is_duplicate_instance,
    is_main_process,
    is_merging,
    log,
    merge_with,
    merges_base_stored_as,
    quantization_of_run,
    quantizes_as_only_axolotl_can,
    recipe_errors,
    save_fsdp2_adapters_with,
    uses_deepspeed,
    uses_fsdp,
)
from longlora_plugin.host.context_parallel import (
    check_padding,
    group_of_rows,
    train_under_deepspeed,
    weigh_targets,
)
from longlora_plugin.host.preference import (
    has_adapter,
    precompute_references,
    use_own_reference,
)
from longlora_plugin.rope import check_built_rope, keep_both_spellings
from longlora_plugin.run.base_model import base_config_of
from longlora_plugin.run.built import adapter_keys_of, enable_attention
from longlora_plugin.run.context_parallel import splits_with_ring_flash_attn
from longlora_plugin.run.document_lengths import report_data
from longlora_plugin.run.manifest import STARTS, check_merged, check_start, manifest_of
from longlora_plugin.run.prepare import PreparedRun, prepare_run
from longlora_plugin.run.recipe import asks_for_longlora
from longlora_plugin.run.summary import Built, Fact, built_facts, closing_block, rope_facts


class LongLoRAPlugin(BasePlugin):
    """Long-context fine-tuning: S²-Attn, LoRA with trainable embeddings and norms, RoPE scaling.

    Inert unless the recipe says `adapter: longlora` or has a `longlora:` block.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []  # a reference model has one, too
        self._models: list[Any] = []
        self._wanted: list[str] = []
        self._built = Built()
        self._finish: list[Callable[[Path], None]] = []
        self._undo: list[Callable[[], None]] = []

    def get_input_args(self) -> str | None:
        return None if is_duplicate_instance(self) else "longlora_plugin.args.LongLoRAArgs"

    def register(self, cfg: Any) -> None:
        """Decide the run and write it into the recipe; nothing is loaded before this passes."""
        if is_duplicate_instance(self) or _carried(cfg) or not asks_for_longlora(cfg):
            return
        self._forget()
        with recipe_errors():
            recipe, merging = cfg.to_dict(), is_merging(cfg)
            if merging:
                # What training started from says nothing of what it ended with.
                recipe.update(dict.fromkeys(STARTS))
            run = prepare_run(recipe, base_config_of(recipe)).checked()
            if merging:
                warnings = _check_merge(cfg, run) if cfg.get("merge_lora") else []
            else:
                warnings = [*run.warnings, *check_start(run)]
            if run.block.held_out and not (merging or cfg.get("inference")):
                from longlora_plugin.evaluation.data import check_held_out_of

                check_held_out_of(run)
        for key, value in {**run.updates, "longlora": CarriedRun(run)}.items():
            cfg[key] = value
        for warning in warnings:
            log.warning("LongLoRA: %s", warning)

    def pre_model_load(self, cfg: Any) -> None:
        run = self._run(cfg)
        if run is not None and run.rope is not None:
            _log(rope_facts(run))

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Name the modules to train, now that the model says which they are."""
        run = self._run(cfg)
        if run is None or run.adapter != "longlora":
            return
        if cfg.seed is not None:
            from transformers import set_seed

            # Axolotl 0.19 draws LoRA's first values unseeded: two runs of one recipe would differ.
            set_seed(cfg.seed)
        keys, self._wanted = adapter_keys_of(run, model, cfg)
        for key, value in keys.items():
            cfg[key] = value

    def post_model_load(self, cfg: Any, model: Any) -> None:
        run = self._run(cfg)
        if run is None:
            return
        with recipe_errors():
            if run.built_rope and not check_built_rope(model, run.built_rope):
                log.warning(
                    "LongLoRA RoPE: this model's rotary embeddings are not transformers' own, so "
                    "whether they were scaled could not be checked"
                )
            # Axolotl 0.19 raises the maximum of the built model, which switches `dynamic` off.
            for field, value in run.rope_fields.items():
                setattr(model.config, field, value)
            keep_both_spellings(model.config)
            if cfg.merge_lora or cfg.inference:
                return
            self._models.append(model)
            late = run.adapter == "longlora" and not has_adapter(model)
            trained = self._prepare_adapter(cfg, run, model) if not late else None
            handle = enable_attention(run, model)
        if handle is not None:
            self._handles.append(handle)
        if len(self._models) > 1:
            return  # a reference model
        if cfg.precompute_ref_log_probs:
            attention = (
                run.group_size,
                run.block.full_attention_below,
                run.block.attention_pattern,
            )
            self._undo.append(precompute_references(self._handles, attention, run.model_config))
        if not late:
            self._describe(cfg, run, trained)

    def _settle_models(self, cfg: Any, run: PreparedRun, trainer: Any) -> None:
        """What only the trainer knows: an adapter that TRL attached, and which model refers."""
        use_own_reference(trainer, self._models)
        for handle in self._handles:
            handle.follow(trainer.model)
        if run.adapter == "longlora" and not has_adapter(self._models[0]):
            with recipe_errors():
                trained = self._prepare_adapter(cfg, run, trainer.model, attached_by_trl=True)
            self._describe(cfg, run, trained)

    def _describe(self, cfg: Any, run: PreparedRun, trained: Any) -> None:
        handle = self._handles[0] if self._handles else None
        self._built = Built.of(handle, trained, cfg.lora_target_modules)
        _log(built_facts(run, self._built))

    def _prepare_adapter(
        self, cfg: Any, run: PreparedRun, model: Any, *, attached_by_trl: bool = False
    ) -> Any:
        if run.adapter != "longlora":
            return None
        from longlora_plugin.adapter.fp32_weights import prepare_adapter
        from longlora_plugin.adapter.fused_loss import cast_heads_for_cut_cross_entropy
        from longlora_plugin.adapter.state import save_adapter
        from longlora_plugin.adapter.zero3 import ZeRO3HookGuard

        trained = prepare_adapter(
            model,
            self._wanted,
            start_from=None if uses_deepspeed(cfg) else cfg.lora_model_dir,
            reason=f"lora_model_dir: {cfg.lora_model_dir} was made without them"
            if cfg.lora_model_dir
            else "the adapter was attached without them",
            rounded=attached_by_trl and bool(cfg.load_in_4bit or cfg.load_in_8bit),
        )
        self._undo.append(cast_heads_for_cut_cross_entropy())
        if uses_deepspeed(cfg):
            self._undo.append(ZeRO3HookGuard().install().remove)
        if uses_fsdp(cfg):
            self._undo.append(save_fsdp2_adapters_with(save_adapter))
        return trained

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        run = self._run(cfg)
        if run is None:
            return []
        self._settle_models(cfg, run, trainer)
        from longlora_plugin.artifacts.callback import SaveArtifacts
        from longlora_plugin.merge.limits import raise_limits_of

        contexts = {run.pretrained_context or 0, run.base_context or 0}
        target = run.target_context if run.rope_fields else 0
        raise_limits_of(trainer, base_config_of(cfg), contexts, target)
        steps = run.block.full_attention_steps_of
        artifacts = SaveArtifacts(manifest_of(run, self._built), steps)
        artifacts.watch(trainer)
        # Anew: an earlier run of this process may have failed.
        self._finish = [partial(_close, cfg.axolotl_config_path, artifacts), artifacts.finish]
        if run.adapter:
            self._finish.append(_shrink_with(run, trainer.model, base_config_of(cfg)))
        if is_main_process():
            report_data(run, trainer.train_dataset, log)
        callbacks: list[Any] = [artifacts]
        if self._handles:
            from longlora_plugin.attention.schedule import AttentionSchedule

            callbacks.append(AttentionSchedule(self._handles, steps, _tell, _warn))
        if run.context_parallel > 1:
            callbacks += self._share_rows(cfg, run, trainer)
        if run.adapter == "longlora" and not (uses_deepspeed(cfg) or uses_fsdp(cfg)):
            from longlora_plugin.adapter.callback import CheckOptimizer

            callbacks.append(CheckOptimizer(str(cfg.optimizer), RecipeError))
        elif run.adapter == "longlora":
            from longlora_plugin.adapter.callback import SaveWholeAdapter

            deepspeed = uses_deepspeed(cfg)
            start = cfg.lora_model_dir if deepspeed else None
            whole = SaveWholeAdapter(trainer.model, saved_by_peft=deepspeed, start_from=start)
            self._finish.append(whole.finish)
            callbacks.append(whole)
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

    def _share_rows(self, cfg: Any, run: PreparedRun, trainer: Any) -> list[Any]:
        from longlora_plugin.attention.sharing import ShareRows

        deepspeed = uses_deepspeed(cfg)
        if deepspeed and not cfg.deepspeed:
            raise RecipeError(
                "context parallelism: Axolotl has not been told of DeepSpeed, with which this run "
                "was launched; write deepspeed: and its file into the recipe as well"
            )
        check_padding(trainer.processing_class, packed=bool(cfg.sample_packing))
        if deepspeed:
            self._undo.append(train_under_deepspeed(trainer, run.context_parallel))
        model = trainer.model

        def group() -> Any:
            # Behind Axolotl's own hooks, which are there once training begins.
            if splits_with_ring_flash_attn():
                self._undo.append(weigh_targets(model, run.context_parallel))
            return group_of_rows(deepspeed=deepspeed)

        return [ShareRows(self._handles, run.context_parallel, group, _tell)]

    def post_train_unload(self, cfg: Any) -> None:
        while self._finish:
            finish = self._finish.pop()
            if is_main_process():
                finish(Path(cfg.output_dir))
        self._forget()

    def _forget(self) -> None:
        """Bring back what the last run's models and upstream's methods were."""
        self._models.clear()
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


def _carried(cfg: Any) -> PreparedRun | None:
    carried = cfg.get("longlora")
    return carried.run if isinstance(carried, CarriedRun) else None


def _tell(line: str) -> None:
    log.info("LongLoRA: %s", line)


def _close(recipe: str | None, artifacts: Any, folder: Path) -> None:
    # The process group is gone; only the main process comes here.
    block = closing_block(artifacts.manifest, str(folder), recipe)
    log.info("%s", block, main_process_only=False)


def _shrink_with(run: PreparedRun, model: Any, base_config: Any) -> Callable[[Path], None]:
    import torch

    from longlora_plugin.adapter.state import embedding_tables, shrink_saved_adapter

    return partial(
        shrink_saved_adapter,
        tables=embedding_tables(model),
        base_rows=getattr(base_config.get_text_config(), "vocab_size", 0),
        dtype=getattr(torch, run.block.embeddings_dtype),
    )


def _warn(line: str) -> None:
    log.warning("LongLoRA: %s", line)


def _log(facts: Iterable[Fact]) -> None:
    for fact in facts:
        log.info("LongLoRA %s", fact)


def _check_merge(cfg: Any, run: PreparedRun) -> list[str]:
    """What an adapter to merge and the recipe disagree about."""
    from longlora_plugin.merge.checks import check_adapter_folder

    if not cfg.adapter:
        raise ValueError(
            "merge-lora: this recipe has no adapter: training it writes the whole model to "
            f"output_dir ({cfg.output_dir}), which is the result; there is nothing to merge"
        )
    key = "lora_model_dir" if cfg.lora_model_dir else "output_dir"
    folder = Path(cfg.lora_model_dir or cfg.output_dir or "./model-out")
    check_adapter_folder(folder)
    merge_with(_merge)
    return check_merged(run, folder, key)


def _merge(cfg: Any, weights: Callable[[Path], None]) -> Path | None:
    """Merge an adapter; `weights` lets Axolotl write the weights of a base that only it knows."""
    run = _carried(cfg)
    if run is None:
        return None
    from longlora_plugin.artifacts.callback import finish
    from longlora_plugin.artifacts.manifest import read_manifest
    from longlora_plugin.merge import checks, folder

    base = base_config_of(cfg)
    stored = checks.quantization_method(base)
    by_axolotl = stored is not None or quantizes_as_only_axolotl_can(cfg)
    target = Path(cfg.output_dir) / "merged"
    with recipe_errors("merge-lora: "):
        merges = merges_base_stored_as(stored, cfg.merge_method)
        checks.check_not_quantized(cfg.base_model, stored, merges)
        record = read_manifest(cfg.lora_model_dir) or manifest_of(run)
        source = folder.Source(
            adapter_dir=Path(cfg.lora_model_dir),
            base_dir=checks.local_folder(cfg.base_model, cfg.revision_of_model),
            base_config=base,
            recipe=run.model_config,
            base_contexts=(run.pretrained_context or 0, run.base_context or 0),
            target_context=record.target_context if record.config_fields else None,
            quantization=None if by_axolotl else quantization_of_run(cfg),
            remote_code=bool(cfg.trust_remote_code),
        )
        disagreements, notes = folder.merge(
            source,
            target,
            weights=weights if by_axolotl else None,
            finish=lambda draft: finish(draft, record, "merged", called=target),
        )
    for disagreement in disagreements:
        log.warning("LongLoRA merge: %s", disagreement)
    for note in notes:
        log.info("LongLoRA merge: %s", note)
    log.info("LongLoRA merge: %s is complete and loads", target)
    return target
