"""`longlora import`: checkpoints of the original project as standard PEFT adapters."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("import")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--base-model", help="Base model, folder or name. Default: adapter_config.json's.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens it was trained for.")
def command(source: Path, target: Path, base_model: str | None, context: int | None) -> None:
    """Make an original LongLoRA checkpoint a PEFT adapter.

    Reads adapter_model with trainable_params, or pytorch_model (.bin or .safetensors, whole or in
    shards); writes safetensors, adapter_config.json, and config.json with the scaled RoPE that the
    original left out. Files that hold more than tensors are refused. The result is loaded once.
    """
    from rich.console import Console

    from longlora_plugin.checkpoints.import_original import import_checkpoint

    done = import_checkpoint(source, target, base_model=base_model, context=context)
    _check(target)
    console = Console()
    console.print(
        f"{target}: {done.lora} LoRA tensors, {done.trained} embeddings and norms"
        + (f", RoPE for {done.context} tokens" if done.context else "")
    )
    for note in done.notes:
        console.print(f"[yellow]note:[/yellow] {note}")


def _check(target: Path) -> None:
    """Load the adapter on its base, without weights; one that does not load is no adapter."""
    from transformers import AutoConfig

    from longlora_plugin.checkpoints.files import read_json
    from longlora_plugin.merge.folder import Source, open_adapter

    path = target / "adapter_config.json"
    base_model = read_json(path)["base_model_name_or_path"]
    try:
        base_config = AutoConfig.from_pretrained(base_model)
    except (OSError, ValueError, TypeError):
        return  # a note has said so
    try:
        open_adapter(Source(target, Path(base_model), base_config))
    except ValueError:
        path.unlink()
        raise
