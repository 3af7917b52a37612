"""`longlora extend-base`: a base model's folder with the RoPE of an adapter."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("extend-base")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def command(run: Path, folder: Path) -> None:
    """Make PEFT's own loaders give the adapter in RUN its RoPE.

    Writes FOLDER: the base model's weights, as links that take no space, with the config that RUN
    was trained with; and names FOLDER as the base model in RUN's adapter_config.json. Then
    AutoPeftModelForCausalLM.from_pretrained(RUN) is right as it is, and so is PeftModel on
    AutoModelForCausalLM.from_pretrained(FOLDER).
    """
    from transformers import AutoConfig

    from longlora_plugin.artifacts.manifest import read_manifest
    from longlora_plugin.checkpoints.files import ADAPTER_CONFIG, read_json
    from longlora_plugin.merge.checks import check_adapter_folder, local_folder
    from longlora_plugin.merge.extended_base import extend_base
    from longlora_plugin.merge.folder import Source

    check_adapter_folder(run)
    manifest = read_manifest(run)
    saved = read_json(run / ADAPTER_CONFIG)
    # An earlier extended base is no longer the one to start from.
    name = manifest.base_model if manifest else str(saved["base_model_name_or_path"])
    base = local_folder(name, manifest.base_model_revision if manifest else saved.get("revision"))
    contexts = (manifest.pretrained_context, manifest.base_context) if manifest else ()
    source = Source(
        adapter_dir=run,
        base_dir=base,
        base_config=AutoConfig.from_pretrained(base),
        base_contexts=tuple(context for context in contexts if context),
        target_context=manifest.target_context if manifest else None,
    )
    for note in extend_base(source, folder):
        click.echo(f"raised: {note}")
    click.echo(f"{folder}: {name} with the RoPE of {run}, whose base model it is now")
    click.echo(
        f"to share {run}, upload {folder} too and write its name on the hub as "
        f"base_model_name_or_path in {run / ADAPTER_CONFIG}; it was {name}"
    )
