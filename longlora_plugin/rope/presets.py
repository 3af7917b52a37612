"""The RoPE presets: each a function of a `RopeRequest` returning new `rope_parameters`.

RoPE turns pair i of a head's d rotary dimensions at position p by p·θ^(−2i/d). A model extended
from O to T tokens meets angles it never saw; each preset brings them back in its own way:
dividing all frequencies (position interpolation: LongLoRA's choice, with factor ⌈T/O⌉), raising θ
(NTK-aware), or dividing the low frequencies only (YaRN, Llama 3.1, LongRoPE).

A preset extends a base that is scaled by its own type, keeps what it has no opinion on, and is
refused on a scaling it cannot be combined with.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from longlora_plugin.hookspecs import hookimpl

SCALING_KEYS = (
    *("rope_type", "factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
)
"""Keys that describe a scaling; all others (θ, partial rotary, mrope_section) are the model's."""


@dataclass(frozen=True)
class RopeRequest:
    """What a preset needs to know.

    Attributes:
        preset: the name the recipe asks for.
        base: the base model's `rope_parameters` for the layers to extend, with `rope_type` and
            `rope_theta`.
        rotary_dim: dimensions of a head that are rotated.
        pretrained_context: tokens of the base model's pretraining, before any scaling.
        base_context: tokens the base model handles as it is.
        target_context: tokens to extend to.
        options: what the recipe says in addition to the preset's name.
        layer_type: the layer type `base` is for, where the model has several; else None.
    """

    preset: str
    base: dict[str, Any]
    rotary_dim: int
    pretrained_context: int
    base_context: int
    target_context: int
    options: dict[str, Any] = field(default_factory=dict)
    layer_type: str | None = None

    @property
    def original_context(self) -> int:
        """`pretrained_context`, by the name that preset packages for version 0.1 read."""
        return self.pretrained_context

    @property
    def rope_type(self) -> str:
        return str(self.base["rope_type"])

    @property
    def theta(self) -> float:
        return float(self.base["rope_theta"])

    @property
    def kept(self) -> dict[str, Any]:
        """The base's parameters that no scaling owns: θ, partial rotary, model-specific keys."""
        return {key: value for key, value in self.base.items() if key not in SCALING_KEYS}

    @property
    def stretch(self) -> float:
        """How much longer the target is than what the base handles; 1 where it is not."""
        return max(1.0, self.target_context / self.base_context)

    @property
    def least_factor(self) -> float:
        """The base's own factor times the stretch: below it the model meets unseen angles."""
        return float(self.base.get("factor") or 1.0) * self.stretch

    @property
    def usual_factor(self) -> float:
        """Target over original context, as YaRN and Llama 3.1 define it; never below the least.

        Llama 3.2 has factor 32 though its maximum is only 16 × 8192: the least factor then decides.
        """
        if self.stretch == 1.0:
            return self.least_factor
        return max(self.least_factor, self.target_context / self.pretrained_context)


UNSCALED_CHOICES = ("yarn", "ntk", "linear")
"""What `auto` tries on an unscaled base, best first."""


def own_preset(request: RopeRequest) -> str:
    """The preset that extends the base model's own scaling; `auto`'s first for an unscaled one."""
    names = {"default": UNSCALED_CHOICES[0], "proportional": "linear"}
    return names.get(request.rope_type, request.rope_type)


def auto(request: RopeRequest) -> dict[str, Any]:
    """YaRN for a base that is not scaled; one that is has its own scaling extended.

    A family that does not take YaRN gets `ntk`. The log, `recipes check` and `longlora.json` say
    what was chosen and why.
    """
    _only(request)
    chosen = own_preset(request)
    if chosen not in PRESETS:
        raise ValueError(
            f"rope: auto cannot extend the base model's own scaling ({request.rope_type}); write "
            "rope: {preset: yarn, replace: true} to drop it"
        )
    return PRESETS[chosen](request)


def linear(request: RopeRequest) -> dict[str, Any]:
    """Position interpolation: every frequency divided by ⌈target / original⌉ (arXiv 2306.15595)."""
    _only(request, "factor")
    rope_type = "proportional" if request.rope_type == "proportional" else "linear"
    _refuse_other_scaling(request, rope_type)
    whole = float(math.ceil(round(request.least_factor, 9)))
    return {**request.kept, "rope_type": rope_type, "factor": _factor(request, whole)}


def dynamic(request: RopeRequest) -> dict[str, Any]:
    """NTK-aware scaling that grows with each sequence longer than `max_position_embeddings`."""
    _only(request, "factor")
    _refuse_other_scaling(request, "dynamic")
    _more_than_one_pair(request)
    factor = _factor(request, request.usual_factor)
    return {**request.kept, "rope_type": "dynamic", "factor": factor}


def ntk(request: RopeRequest) -> dict[str, Any]:
    """NTK-aware: θ·s^(d/(d−2)), so the lowest frequency is divided by s, the highest kept.

    s is target / supported context: on a scaled base the rest of its scaling stays as it is.
    """
    _only(request, "factor")
    _refuse_other_scaling(request, "linear", "llama3", "yarn")
    _more_than_one_pair(request)
    stretch = _factor(request, request.stretch, least=request.stretch)
    exponent = request.rotary_dim / (request.rotary_dim - 2)
    return {**request.base, "rope_theta": request.theta * stretch**exponent}


def theta(request: RopeRequest) -> dict[str, Any]:
    """An explicit θ (option `theta`; `base` and `rope_theta` mean the same); all else is kept."""
    names = ("theta", "base", "rope_theta")
    _only(request, *names)
    _refuse_other_scaling(request, "linear", "llama3", "yarn", "proportional")
    given = [name for name in names if name in request.options]
    if len(given) != 1:
        said = f"both {' and '.join(given)} are given" if given else "no theta is given"
        raise ValueError(
            f"rope: theta: {said}; write rope: {{preset: theta, theta: 1000000}} "
            f"(the base model's is {request.theta:g})"
        )
    return {**request.base, "rope_theta": _number(request, given[0], above=1.0)}


def yarn(request: RopeRequest) -> dict[str, Any]:
    """YaRN: high frequencies kept, low ones divided, a ramp between, logits sharpened.

    arXiv 2309.00071; factor = target / original. A base that has YaRN keeps its other settings.
    """
    numbers = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    _only(request, "factor", "truncate", *numbers)
    _refuse_other_scaling(request, "yarn")
    known = {"beta_fast": 32.0, "beta_slow": 1.0}
    known |= _of_base(request, "yarn", "truncate", *numbers) | _given_numbers(request, numbers)
    if "truncate" in request.options:
        known["truncate"] = _flag(request, "truncate")
    if known["beta_fast"] <= known["beta_slow"]:
        raise ValueError(
            f"rope: yarn: beta_fast {known['beta_fast']:g} must be above beta_slow "
            f"{known['beta_slow']:g}; the paper's are beta_fast: 32, beta_slow: 1"
        )
    if ("mscale" in known) != ("mscale_all_dim" in known):
        raise ValueError(
            "rope: yarn: mscale and mscale_all_dim work only together; "
            "write both, or attention_factor: <number>"
        )
    if request.layer_type and known.get("truncate") is False:
        raise ValueError(
            "rope: yarn: truncate: false has no effect in transformers where layer types have "
            "their own RoPE; leave truncate out"
        )
    return _scaling(request, "yarn", known)


def llama3(request: RopeRequest) -> dict[str, Any]:
    """Llama 3.1: wavelengths above original/low divided, below original/high kept, a ramp between.

    factor = target / original. A base that has it keeps its original context, low and high.
    """
    numbers = ("low_freq_factor", "high_freq_factor")
    _only(request, "factor", *numbers)
    _refuse_other_scaling(request, "llama3")
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    known |= _of_base(request, "llama3", *numbers) | _given_numbers(request, numbers)
    if known["high_freq_factor"] <= known["low_freq_factor"]:
        raise ValueError(
            f"rope: llama3: high_freq_factor {known['high_freq_factor']:g} must be above "
            f"low_freq_factor {known['low_freq_factor']:g}; Llama 3.1 has 4 and 1"
        )
    return _scaling(request, "llama3", known)


def longrope(request: RopeRequest) -> dict[str, Any]:
    """LongRoPE: a searched divisor for every frequency, one list up to the original context, one
    above it (arXiv 2402.13753).

    An unscaled base needs both lists. A base that has them keeps its own; without a new
    `long_factor` its long list is multiplied by target / supported context.
    """
    lists = ("short_factor", "long_factor")
    _only(request, "factor", "attention_factor", *lists)
    _refuse_other_scaling(request, "longrope")
    known = _of_base(request, "longrope", "attention_factor", *lists)
    if "long_factor" in known:
        known["long_factor"] = [value * request.stretch for value in known["long_factor"]]
    known |= {name: _numbers(request, name) for name in lists if name in request.options}
    missing = [name for name in lists if name not in known]
    if missing:
        raise ValueError(
            f"rope: longrope needs {' and '.join(missing)}, {request.rotary_dim // 2} numbers each "
            "(found by a search for this model); without them write rope: yarn"
        )
    if "attention_factor" in request.options:
        known["attention_factor"] = _number(request, "attention_factor")
    return _scaling(request, "longrope", known)


def _scaling(request: RopeRequest, rope_type: str, own: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a type that stores the original context, with its `own` ones."""
    return {
        **request.kept,
        "rope_type": rope_type,
        "factor": _factor(request, request.usual_factor),
        "original_max_position_embeddings": request.pretrained_context,
        **own,
    }


def none(request: RopeRequest) -> dict[str, Any]:
    """The base model's own RoPE, whatever it is."""
    _only(request)
    return request.base


PRESETS: dict[str, Callable[[RopeRequest], dict[str, Any]]] = {
    "auto": auto,
    "linear": linear,
    "pi": linear,
    "dynamic": dynamic,
    "ntk": ntk,
    "theta": theta,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
    "none": none,
}
"""The built-in presets by the names recipes use."""


@hookimpl
def longlora_rope_presets() -> dict[str, Callable[..., Any]]:
    """The built-in presets."""
    return dict(PRESETS)


def _only(request: RopeRequest, *allowed: str) -> None:
    for name in request.options:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if name == "original_max_position_embeddings":
                hint = "write original_context: <tokens> next to rope: instead. "
            valid = ", ".join((*allowed, "replace")) if request.preset != "none" else "none at all"
            raise ValueError(
                f"rope: {request.preset} has no option {name!r}; {hint}Options: {valid}"
            )


def _more_than_one_pair(request: RopeRequest) -> None:
    if request.rotary_dim <= 2:
        raise ValueError(
            f"rope: {request.preset} needs more than 2 rotary dimensions, the base model has "
            f"{request.rotary_dim}; write rope: linear"
        )


def _refuse_other_scaling(request: RopeRequest, *extendable: str) -> None:
    if request.rope_type in ("default", *extendable):
        return
    own = {"proportional": "linear"}.get(request.rope_type, request.rope_type)
    extend = f"rope: {own} to extend that, or " if own in PRESETS else ""
    raise ValueError(
        f"rope: {request.preset} cannot be added to the base model's own scaling "
        f"({request.rope_type}, {request.base_context} tokens); write {extend}"
        f"rope: {{preset: {request.preset}, replace: true}} to drop it and scale from the "
        f"{request.pretrained_context} tokens of pretraining"
    )


def _factor(request: RopeRequest, usual: float, least: float | None = None) -> float:
    """The option `factor` if given and large enough, else `usual`."""
    if "factor" not in request.options:
        return usual
    least = request.least_factor if least is None else least
    factor = _number(request, "factor")
    if factor < least * (1 - 1e-9):
        raise ValueError(
            f"rope: {request.preset}: factor {factor:g} is too small to extend "
            f"{request.base_context} to {request.target_context} tokens; write factor: "
            f"{math.ceil(round(least, 9))} (at least {least:g}), or leave it out"
        )
    return factor


def _of_base(request: RopeRequest, rope_type: str, *names: str) -> dict[str, Any]:
    """What the base says about `names`, if it is scaled by `rope_type`."""
    if request.rope_type != rope_type:
        return {}
    return {name: request.base[name] for name in names if request.base.get(name) is not None}


def _given_numbers(request: RopeRequest, names: Sequence[str]) -> dict[str, float]:
    """Those of the options `names` that are given."""
    return {name: _number(request, name) for name in names if name in request.options}


def _number(request: RopeRequest, name: str, value: Any = None, *, above: float = 0.0) -> float:
    value = request.options[name] if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and value > above:
        return float(value)
    hint = ""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", value):
        hint = f", here {float(value):.0f} (YAML reads {value} as text)"
    raise ValueError(
        f"rope: {request.preset}: {name}: got {value!r}; write a number above {above:g}{hint}"
    )


def _numbers(request: RopeRequest, name: str) -> list[float]:
    """A list option with one number for each rotated pair."""
    values, length = request.options[name], request.rotary_dim // 2
    if not isinstance(values, list | tuple) or len(values) != length:
        got = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
        raise ValueError(
            f"rope: {request.preset}: {name}: got {got}; write a list of {length} numbers, one "
            "for each rotated pair of dimensions"
        )
    return [_number(request, name, value) for value in values]


def _flag(request: RopeRequest, name: str) -> bool:
    value = request.options[name]
    if not isinstance(value, bool):
        raise ValueError(f"rope: {request.preset}: {name}: got {value!r}; write true or false")
    return value
