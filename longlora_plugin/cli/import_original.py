"""`axolotl longlora import`: checkpoints of the original project as standard PEFT adapters."""

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

    Reads adapter_model.bin with trainable_params.bin, or pytorch_model.bin; writes safetensors,
    adapter_config.json, and config.json with the scaled RoPE that the original left out. Files
    that hold more than tensors are refused.
    """
    from rich.console import Console

    from longlora_plugin.checkpoints.import_original import import_checkpoint

    done = import_checkpoint(source, target, base_model=base_model, context=context)
    console = Console()
    console.print(
        f"{target}: {done.lora} LoRA tensors, {done.trained} embeddings and norms"
        + (f", RoPE for {done.context} tokens" if done.context else "")
    )
    for note in done.notes:
        console.print(f"[yellow]note:[/yellow] {note}")
