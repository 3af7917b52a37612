"""`python -m longlora_plugin.cli`: the commands for `accelerate launch -m`."""

from longlora_plugin.cli import longlora

longlora(prog_name="longlora")
