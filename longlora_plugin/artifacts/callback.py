"""`longlora.json`, the model card and the tokenizer's class name in every folder a run saves."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from longlora_plugin.artifacts.card import Kind, write_card
from longlora_plugin.artifacts.manifest import Manifest, write_manifest
from longlora_plugin.checkpoints.files import read_json, weight_files, write_json

TOKENIZER_CLASS, OLDER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
"""What transformers 5 writes ("Tokenizer class TokenizersBackend does not exist", says version 4
and with it llama.cpp's converter), and a name that both know.
"""
ATTEMPTS = 5
"""How often, a second apart, a saved folder is read."""


class SaveArtifacts(TrainerCallback):
    """Completes each checkpoint, and, through `finish`, the run's own folder.

    Args:
        manifest: what is known before the first step.
        full_attention_steps: function of the run's total steps → how many of the last ones use
            full attention.
    """

    def __init__(self, manifest: Manifest, full_attention_steps: Callable[[int], int]) -> None:
        self.manifest = manifest
        self.full_attention_steps = full_attention_steps
        self.began = time.time()

    def watch(self, trainer: Any) -> None:
        """Complete the card whenever the trainer writes its own, also before it pushes to a hub."""
        original = trainer.create_model_card

        @functools.wraps(original)
        def create_model_card(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            folder = Path(trainer.args.output_dir)
            # TRL calls it at each checkpoint, when an earlier run's weights may be in the folder.
            saved = any(file.stat().st_mtime >= self.began for file in weight_files(folder))
            if saved and trainer.is_world_process_zero():
                self.finish(folder)
            return result

        trainer.create_model_card = create_model_card

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps done, and those of them with full attention."""
        first_full = state.max_steps - self.full_attention_steps(state.max_steps)
        self.manifest = replace(
            self.manifest,
            steps=state.global_step,
            full_attention_steps=max(0, state.global_step - first_full),
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete a checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            if self.manifest.adapter and not (folder / "config.json").is_file():
                kwargs["model"].config.save_pretrained(folder)  # the run's, which PEFT leaves out
            self.finish(folder)

    def finish(self, folder: Path) -> None:
        """Complete a folder of the run.

        Under FSDP2 every process saves the tokenizer, so a file may be half written for a moment.
        """
        kind: Kind = "adapter" if self.manifest.adapter else "model"
        for attempt in range(ATTEMPTS):
            try:
                return finish(folder, self.manifest, kind)
            except ValueError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(1)


def finish(folder: Path, manifest: Manifest, kind: Kind, *, called: Path | None = None) -> None:
    """Write what a saved folder says about itself.

    Args:
        manifest: of a merged folder's adapter, or of the recipe where the adapter has none.
        kind, called: as for `write_card`.
    """
    name_for_older_readers(folder)
    write_manifest(folder, manifest)
    write_card(folder, manifest, kind, called=called)


def name_for_older_readers(folder: Path) -> bool:
    """Write the older class name into a folder's `tokenizer_config.json`; whether it changed."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    content = read_json(path)
    if content.get("tokenizer_class") != TOKENIZER_CLASS:
        return False
    write_json(path, {**content, "tokenizer_class": OLDER_CLASS})
    return True
