"""The `longlora:` block of a recipe: every key, its default and its meaning. Loads no torch.

A default is stated here and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WrapSerializer,
    WrapValidator,
    field_validator,
    model_validator,
)

DEFAULT_GROUP_SIZE_RATIO = 0.25
"""The paper's group size: a quarter of the training length (LongLoRA, Table 7)."""


class LongLoRAConfig(BaseModel):
    """The nested `longlora:` block. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")

    shifted_attention: bool = Field(
        default=True,
        description="Train with shifted sparse attention (S²-Attn). Evaluation never uses it.",
    )
    attention_pattern: str = Field(
        default="s2",
        description="Who attends to whom: `s2`; `pose`, groups without a shift, whose positions "
        "skip (PoSE); or a pattern that an installed package adds.",
    )
    group_size: int | None = Field(
        default=None, description="Tokens in a group, even; instead of `group_size_ratio`."
    )
    group_size_ratio: float | None = Field(
        default=None,
        description=f"Group size as a share of `sequence_len` ({DEFAULT_GROUP_SIZE_RATIO}).",
    )
    full_attention_below: int = Field(
        default=0, ge=0, description="Documents of up to this many tokens use full attention."
    )
    full_attention_steps: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="Last steps trained with full attention: a share below 1, or a number "
        "(the paper: 0).",
    )
    trainable: list[str] = Field(
        default=["embeddings", "norms"],
        description="Kinds of modules trained in addition to LoRA, with `adapter: longlora` only.",
    )
    embeddings_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Dtype of trained embeddings in the finished adapter; `bfloat16` halves its "
        "size. They train in float32, and checkpoints keep that.",
    )
    rope: str | dict[str, Any] = Field(
        default="auto",
        description="RoPE preset: a name, a mapping `{preset: yarn, factor: 8}`, or `none` "
        "(the paper: `linear`).",
    )
    original_context: int | None = Field(
        default=None, ge=1, description="Context of the base model; default: what its config says."
    )
    held_out: str | None = Field(
        default=None,
        description="Text whose full-attention perplexity by position is logged while training: "
        "a file, a folder, or a Hugging Face dataset.",
    )
    held_out_steps: int = Field(
        default=100, ge=1, description="Steps between two looks at `held_out`."
    )

    @field_validator("group_size")
    @classmethod
    def _group_is_even(cls, value: int | None) -> int | None:
        if value is not None and (value < 2 or value % 2):
            raise ValueError(
                f"got {value}; a group is shifted by half its size, so it must be an even number "
                f"of tokens, at least 2. Write group_size: {max(2, value + value % 2)}"
            )
        return value

    @field_validator("group_size_ratio")
    @classmethod
    def _ratio_is_a_share(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(
                f"got {value}; it is a share of sequence_len, above 0 and up to 1. "
                f"Write group_size_ratio: {DEFAULT_GROUP_SIZE_RATIO}, or group_size: <tokens>"
            )
        return value

    @field_validator("full_attention_steps")
    @classmethod
    def _steps_are_a_share_or_whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(
                f"got {value}; write a share below 1 (0.1: the last tenth of the steps) "
                f"or a whole number of steps ({round(value)})"
            )
        return value

    @model_validator(mode="after")
    def _one_way_to_say_the_group(self) -> LongLoRAConfig:
        if self.group_size is not None and self.group_size_ratio is not None:
            raise ValueError(
                f"group_size: {self.group_size} and group_size_ratio: {self.group_size_ratio} "
                "are two answers to one question; keep one of them"
            )
        return self

    @property
    def rope_preset(self) -> str:
        """Name of the RoPE preset; `none` where the recipe switches RoPE scaling off."""
        if isinstance(self.rope, Mapping):
            return str(self.rope.get("preset", "none"))
        return self.rope

    @property
    def rope_options(self) -> dict[str, Any]:
        """Options of the RoPE preset, without its name."""
        if not isinstance(self.rope, Mapping):
            return {}
        return {key: value for key, value in self.rope.items() if key != "preset"}

    @field_validator("trainable", mode="before")
    @classmethod
    def _kinds_are_a_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"got {value!r}; write trainable: [{value}]")
        return value

    @field_validator("rope", mode="before")
    @classmethod
    def _mapping_names_its_preset(cls, value: Any) -> Any:
        if value is None:
            return "none"  # `rope: null` in YAML
        if isinstance(value, Mapping) and "preset" not in value:
            raise ValueError(
                f"got a mapping without a preset ({sorted(value)}); "
                "write rope: {preset: yarn, factor: 8}"
            )
        if isinstance(value, Mapping):
            for option, key in (
                ("original_context", "longlora: {original_context: …}"),
                ("target_context", "sequence_len"),
                ("base_config", "base_model"),
            ):
                if option in value:
                    raise ValueError(f"{option} is not an option of a preset; write {key}")
        return value

    def group_size_for(self, sequence_len: int) -> int:
        """Tokens in a group for rows of up to `sequence_len` tokens: always even, at least 2.

        The group follows the recipe's `sequence_len`, never the batch at hand.

        Raises:
            ValueError: the group is longer than the context, or the share gives less than 2 tokens.
        """
        if self.group_size is not None:
            if self.group_size > sequence_len:
                raise ValueError(
                    f"longlora.group_size: {self.group_size} is larger than sequence_len: "
                    f"{sequence_len}; write at most {sequence_len // 2 * 2}, "
                    f"the paper's choice is {max(2, sequence_len // 8 * 2)}"
                )
            return self.group_size
        ratio = DEFAULT_GROUP_SIZE_RATIO if self.group_size_ratio is None else self.group_size_ratio
        group_size = int(sequence_len * ratio) // 2 * 2
        if group_size < 2:
            raise ValueError(
                f"longlora.group_size_ratio: {ratio} of sequence_len: {sequence_len} is less than "
                "2 tokens; write a larger share, or group_size: <tokens>"
            )
        return group_size

    def full_attention_steps_of(self, max_steps: int) -> int:
        """How many of the last steps of a run of `max_steps` steps use full attention."""
        steps = self.full_attention_steps
        return min(max_steps, round(steps * max_steps) if steps < 1 else int(steps))


class CarriedRun:
    """What `register` decided about a run, in the place of the block it was decided from.

    It goes with the recipe through Axolotl's validation, copies and worker processes, so that
    every hook finds the decision of its own recipe. YAML has no way to write one.

    Attributes:
        run: the `PreparedRun`.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def __str__(self) -> str:
        return str(self.run)  # in Axolotl's log of the recipe


def _pass_carried_run(value: Any, handler: Callable[[Any], Any]) -> Any:
    return value if isinstance(value, CarriedRun) else handler(value)


class LongLoRAArgs(BaseModel):
    """What the plugin adds to Axolotl's schema: one optional block."""

    longlora: Annotated[
        LongLoRAConfig | None,
        WrapValidator(_pass_carried_run),
        WrapSerializer(_pass_carried_run),
    ] = Field(default=None, description="LongLoRA: shifted sparse attention and RoPE scaling.")


def parse_block(raw: Any) -> LongLoRAConfig:
    """The `longlora:` block of a recipe as a typed config.

    Args:
        raw: the block as YAML gives it; None (an empty block) means all defaults.

    Raises:
        ValueError: says every wrong key and value at once, what is allowed, what to write instead.
    """
    block, problems = read_block(raw)
    if problems:
        raise ValueError("\n".join(problems))
    return block


def read_block(raw: Any) -> tuple[LongLoRAConfig, list[str]]:
    """The `longlora:` block of a recipe, and a line for each thing that is wrong with it.

    Where keys are wrong, the block is what is left without them, to be checked all the same.
    """
    if not isinstance(raw, Mapping | None):
        return LongLoRAConfig(), [
            f"longlora: got {raw!r}; write a block of keys, for example\n"
            "longlora:\n  shifted_attention: true"
        ]
    given = {str(key): value for key, value in (raw or {}).items()}
    try:
        return LongLoRAConfig(**given), []
    except ValidationError as error:
        errors = error.errors()
    problems = list(dict.fromkeys(_explain(each) for each in errors))
    wrong = {each["loc"][0] for each in errors if each["loc"]}
    with suppress(ValidationError):  # of keys that contradict each other, and were reported
        return LongLoRAConfig(**{k: v for k, v in given.items() if k not in wrong}), problems
    return LongLoRAConfig(), problems


EXPECTED = {
    "list": "a list",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a name",
    "dict": "a mapping",
}
"""First word of pydantic's error types → what to write."""
EXAMPLES = {
    "trainable": "trainable: [embeddings, norms]",
    "group_size": "group_size: 2048",
    "group_size_ratio": "group_size_ratio: 0.25",
    "full_attention_steps": "full_attention_steps: 0.1",
    "rope": "rope: yarn",
    "held_out": "held_out: books.txt",
    "held_out_steps": "held_out_steps: 100",
}


def _explain(problem: Any) -> str:
    loc = [part for part in problem["loc"] if part not in ("str", "dict[str,any]")]
    key = ".".join(str(part) for part in ("longlora", *loc))
    kind = problem["type"].split("_")[0]
    if kind in EXPECTED:
        given = problem["input"]
        example = EXAMPLES.get(loc[0], "")
        if kind == "dict":
            example = f"{loc[0]}: {{preset: yarn, factor: 8}}"
        instead = f", for example {example}" if example else ""
        return f"{key}: got {given!r}; write {EXPECTED[kind]}{instead}"
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error":
            return f"{key}: {message}"
        return f"{key}: got {problem['input']!r}; {message[0].lower()}{message[1:]}"
    valid = list(LongLoRAConfig.model_fields)
    near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.0)
    return (
        f"{key} is not a key of the longlora block; did you mean {near[0]!r}? "
        f"Keys: {', '.join(valid)}"
    )
