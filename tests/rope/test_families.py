"""Every family of the families table with every preset: it builds and rotates by transformers'
formula, or is refused by name before anything is loaded."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import FAMILIES
from family_models import tiny_config
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from unsupported_families import UNSUPPORTED

from longlora_plugin.rope import (
    PRESETS,
    apply_rope,
    base_context_of,
    has_rope,
    resolve_rope,
    rope_parameters_of,
)
from longlora_plugin.rope.base_config import extended_layer, rotary_dim_of

TABLE = {name: family for name, (family, _) in UNSUPPORTED.items()} | FAMILIES
PRESET_NAMES = [name for name in PRESETS if name not in ("pi", "none")]
EVERY = pytest.mark.parametrize("name", [name for name in TABLE if name in CONFIG_MAPPING])


def options(preset, config):
    pairs = rotary_dim_of(config.get_text_config()) // 2
    lists = {"short_factor": [1.5 + i for i in range(pairs)]}
    lists["long_factor"] = [4.0 + i for i in range(pairs)]
    return {"theta": {"theta": 3e6}, "longrope": lists}.get(preset, {})


@cache
def resolved(name):
    """preset → (config, settings), or the message that refuses it."""
    found = {}
    for preset in PRESET_NAMES:
        config = tiny_config(name, TABLE[name])
        try:
            target = 4 * base_context_of(config)
            settings = resolve_rope(preset, config, target, **options(preset, config))
        except ValueError as error:
            found[preset] = str(error)
            continue
        apply_rope(config, settings)
        found[preset] = config, settings
    return found


def rotaries(model):
    return [
        module
        for path, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
        and hasattr(module, "config")
        and not any(part in path for part in ("vision", "visual", "audio"))
    ]


def needs_rope(name):
    if not has_rope(tiny_config(name, TABLE[name])):
        pytest.skip(f"{name} has no RoPE that its config can scale")


@EVERY
def test_each_preset_builds_or_is_refused_by_name(name):
    needs_rope(name)
    for preset, result in resolved(name).items():
        if isinstance(result, str):
            assert "rite rope: " in result, (preset, result)
            continue
        config, settings = result
        assert settings.extended
        with torch.device("meta"):
            getattr(transformers, TABLE[name].auto).from_config(config)


@EVERY
def test_what_builds_rotates_by_transformers_formula(name):
    needs_rope(name)
    for preset, result in resolved(name).items():
        if isinstance(result, str):
            continue
        config, _ = result
        layer_type, layer = extended_layer(rope_parameters_of(config))
        with torch.device("meta"):
            model = getattr(transformers, TABLE[name].auto).from_config(config)
        for rotary in rotaries(model):
            built = type(rotary)(config=rotary.config)
            found = getattr(built, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
            if layer["rope_type"] == "default":
                dim = rotary_dim_of(rotary.config)
                expected = layer["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
            else:
                function = ROPE_INIT_FUNCTIONS[layer["rope_type"]]
                expected = function(rotary.config, "cpu", layer_type=layer_type)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, msg=f"{name} {preset}")


LENGTH_MATTERS = ("dynamic", "longrope")


@EVERY
def test_dynamic_and_longrope_change_with_the_length_of_a_row(name):
    needs_rope(name)
    for preset in LENGTH_MATTERS:
        result = resolved(name)[preset]
        if isinstance(result, str) or rotary_dim_of(result[0].get_text_config()) <= 2:
            continue
        config, settings = result
        layer_type, _ = extended_layer(rope_parameters_of(config))
        with torch.device("meta"):
            model = getattr(transformers, TABLE[name].auto).from_config(config)
        for rotary in rotaries(model):
            built = type(rotary)(config=rotary.config)
            buffer = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
            before = getattr(built, buffer).clone()
            length = settings.max_position_embeddings * (4 if preset == "dynamic" else 1)
            row = torch.arange(length - 1, length)[None]
            arguments = {"layer_type": layer_type} if layer_type else {}
            shapes = (row, row[None].expand(3, 1, 1))  # multimodal positions have three axes
            for positions in shapes:
                try:
                    built(torch.zeros(1, 1, 1), positions, **arguments)
                    break
                except (IndexError, RuntimeError, ValueError):
                    built = type(rotary)(config=rotary.config)
            else:
                pytest.fail(f"{name}: no positions that {type(rotary).__name__} takes")
            assert not torch.equal(before, getattr(built, buffer)), preset


def full_attention_rotates(name):
    """Whether full attention layers notice when rotary embeddings are replaced; None: no such."""
    if name not in FAMILIES:
        return None
    config = tiny_config(name, TABLE[name])
    torch.manual_seed(0)
    model = getattr(transformers, TABLE[name].auto).from_config(config).eval()
    seen = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, args, kwargs)), with_kwargs=True
        )
        for module in model.modules()
        if getattr(module, "layer_idx", None) in TABLE[name].full
        and type(module).__name__.endswith(("Attention", "MLA"))
    ]
    ids = torch.randint(10, 97, (1, 9), generator=torch.Generator().manual_seed(1))
    zeros = {key: torch.zeros_like(ids) for key in TABLE[name].zeros}
    with torch.no_grad():
        model(ids, use_cache=False, **zeros)
        for hook in hooks:
            hook.remove()
        noticed = []
        for module, args, kwargs in seen:
            rotation = kwargs.get("position_embeddings")
            if not isinstance(rotation, tuple):
                continue
            first = module(*args, **kwargs)[0]
            other = {**kwargs, "position_embeddings": tuple(part.flip(-2) for part in rotation)}
            noticed.append(not torch.equal(first, module(*args, **other)[0]))
    return any(noticed) if noticed else None


@EVERY
def test_full_attention_rotates_wherever_rope_can_be_scaled(name):
    needs_rope(name)
    refused = isinstance(resolved(name)["auto"], str)
    rotates = full_attention_rotates(name)
    if rotates is False:
        assert refused
        assert "rite rope: none" in resolved(name)["auto"]
    if rotates:
        assert not refused or "rotates in its" not in resolved(name)["auto"]


def test_layers_without_rope_among_full_attention_do_not_stop_an_extension():
    config = tiny_config("smollm3", FAMILIES["smollm3"])  # its second layer has no positions
    assert resolve_rope("auto", config, 4 * base_context_of(config)).preset == "yarn"


def test_refusals_of_auto_are_auto_s_own():
    for name in ("cohere2", "exaone4", "afmoe", "llama4_text"):
        if name in CONFIG_MAPPING:
            assert resolved(name)["auto"].startswith("rope: auto: ")


def test_a_head_dim_that_is_none_is_written_where_transformers_reads_it():
    base = SimpleNamespace(
        max_position_embeddings=64, rope_theta=1e4, head_dim=None, hidden_size=64
    )
    base.num_attention_heads = 4
    assert resolve_rope("yarn", base, 128).config_fields["head_dim"] == 16
    base.head_dim = 8
    assert "head_dim" not in resolve_rope("yarn", base, 128).config_fields
