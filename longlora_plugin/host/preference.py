"""TRL's preference trainers as Axolotl uses them: reference models, and what they precompute."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from longlora_plugin.host.compat import RecipeError


def has_adapter(model: Any) -> bool:
    """Whether PEFT has wrapped a model. For DPO, IPO and KTO, TRL has it do so, later."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def precompute_references(handles: Sequence[Any], *decided_by: object) -> Callable[[], None]:
    """Have the reference that DPO precomputes use the attention of the training steps.

    It stands for passes inside those steps, though the model is not in training mode yet. TRL keeps
    the values in the dataset's cache under a name made of rows and weights only; attention and RoPE
    decide them as well, so they become part of the name.

    Args:
        handles: of the models that the run loads; looked at when the trainer is made.
        decided_by: what the values depend on in addition to rows and weights.

    Returns:
        Function that puts TRL's own method back.
    """
    from trl import DPOTrainer

    trainer_class: Any = DPOTrainer
    original = trainer_class._precompute_ref_logps
    decided = hashlib.sha256(str(decided_by).encode()).hexdigest()[:16]

    @functools.wraps(original)
    def precompute(trainer: Any, dataset: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        dataset = copy.copy(dataset)
        dataset._fingerprint = f"{dataset._fingerprint}-{decided}"
        # Rows for evaluation are compared with a policy that runs full attention there.
        for handle in handles:
            handle.precomputing = name == "train"
        try:
            return original(trainer, dataset, name, *args, **kwargs)
        finally:
            for handle in handles:
                handle.precomputing = False

    trainer_class._precompute_ref_logps = precompute
    return functools.partial(setattr, trainer_class, "_precompute_ref_logps", original)


def use_own_reference(trainer: Any, models: Sequence[Any]) -> None:
    """Where a trainer has read its reference model from disk, give it the one Axolotl built.

    KTO's and GRPO's do so without an adapter; only Axolotl's has the run's config, RoPE included.

    Args:
        models: what Axolotl built: the policy and, without an adapter, the reference.

    Raises:
        RecipeError: Axolotl built none.
    """
    theirs = getattr(trainer, "ref_model", None)
    if theirs is None or any(_contains(theirs, model) for model in models):
        return
    own = next((model for model in models if not _contains(trainer.model, model)), None)
    if own is None:
        raise RecipeError(
            f"{type(trainer).__name__} has read a reference model from disk, without the RoPE and "
            "the attention of this run; write adapter: longlora, which needs none"
        )
    from trl.models import prepare_deepspeed, prepare_fsdp
    from trl.trainer.utils import disable_dropout_in_model

    if getattr(trainer.args, "disable_dropout", False):
        disable_dropout_in_model(own)
    if trainer.is_deepspeed_enabled:
        prepared = prepare_deepspeed(own, trainer.accelerator)
    elif trainer.is_fsdp_enabled:
        prepared = prepare_fsdp(own, trainer.accelerator)
    else:
        prepared = trainer.accelerator.prepare_model(own, evaluation_mode=True)
    trainer.ref_model = prepared
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "ref_model", None) is theirs:
            callback.ref_model = prepared


def _contains(model: Any, part: Any) -> bool:
    return any(module is part for module in model.modules())
