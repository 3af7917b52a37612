"""A PEFT adapter on a base model without weights: what each of the model's tensors becomes.

PEFT builds and loads the adapter and computes every update with its own layers (LoRA of any layer
type and variant, trained copies, trained tokens), one base tensor at a time. So nothing needs to
know what an adapter may hold, and a 70B model needs the memory of its largest tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from longlora_plugin.adapter.state import ADAPTER, plain_name, read_adapter_state

CHANGE_THE_BASE = ("pissa", "olora", "loftq")
"""Initialisations that take from the base's weights what LoRA begins with, reproducibly."""


class AdaptedModel:
    """A base model without weights, with its adapter loaded.

    Args:
        base: the base model on the meta device.
        adapter_dir: the adapter's folder.

    Attributes:
        base: the base model.
        changed: names, as in the base model, of the tensors that are not the base's.
        ties: name → all names of that tensor, for tensors that have several.

    Raises:
        ValueError: PEFT cannot merge such an adapter, or the adapter does not fit the base.
    """

    def __init__(self, base: Any, adapter_dir: Path) -> None:
        self.base = base
        self.ties = tied_names(base)
        self._shapes = {name: tuple(t.shape) for name, t in base.state_dict().items()}
        self._config, self._init = _config_of(adapter_dir)
        self._model = _attach(base, self._config)
        saved = _load(self._model, adapter_dir)
        self._trained: dict[str, Any] = {}
        self._replaced: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._tokens: dict[str, Any] = {}
        self._index({plain_name(name) for name in saved})
        self.changed = {*self._trained, *self._replaced, *self._layers, *self._tokens}

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in the trained model; rows of new tokens are counted."""
        return self._shapes[name]

    def trained(self, name: str) -> Any:
        """A tensor that was trained as a whole, else None."""
        return self._trained.get(name)

    def value(self, name: str, tensor: Any, rounding: Callable[[Any], Any] | None = None) -> Any:
        """What the base's tensor is in the trained model; an update is added in fp32.

        Args:
            rounding: what training did to the base's weight (4-bit), if anything.

        Raises:
            ValueError: the update has values that are not finite.
        """
        if name in self._trained:
            return self._trained[name]
        tensor = self._replaced.get(name, tensor)
        if rounding is not None:
            tensor = rounding(tensor)
        owner = self._layers.get(name) or self._tokens.get(name)
        return tensor if owner is None else self._merged(owner, name, tensor, rounding)

    def _merged(self, owner: Any, name: str, tensor: Any, rounding: Any) -> Any:
        import torch

        module, field = owner.get_base_layer(), name.rsplit(".", 1)[-1]
        own = dict(module._parameters)
        module._parameters[field] = torch.nn.Parameter(tensor.clone(), requires_grad=False)
        for other, parameter in own.items():
            # Merged in addition where LoRA has a bias; what becomes of it here is not used.
            if other in ("weight", "bias") and other != field and parameter is not None:
                module._parameters[other] = torch.nn.Parameter(
                    torch.zeros(parameter.shape), requires_grad=False
                )
        try:
            if self._init and field == "weight":
                self._begin(owner)
                if rounding is not None:
                    module._parameters[field].data = rounding(module._parameters[field].data)
            module._parameters[field].data = module._parameters[field].data.float()
            owner.merge(adapter_names=[ADAPTER])
            merged = module._parameters[field].data
        finally:
            module._parameters.update(own)
            owner.merged_adapters.clear()
        if not torch.isfinite(merged).all():
            raise ValueError(f"the adapter has values that are not finite in {name}")
        return merged

    def _begin(self, owner: Any) -> None:
        """Take from the base's weight what the initialisation took, as PEFT does on loading."""
        own = (
            {key: owner.lora_A[key].weight.data for key in owner.lora_A},
            {key: owner.lora_B[key].weight.data for key in owner.lora_B},
        )
        if self._init == "olora":
            owner.olora_init(ADAPTER)
        elif self._init == "pissa":
            owner.pissa_init(ADAPTER, self._init)
        else:
            owner.loftq_init(ADAPTER, self._config)
        for layers, weights in zip((owner.lora_A, owner.lora_B), own, strict=True):
            for key, weight in weights.items():
                layers[key].weight.data = weight

    def _index(self, saved: set[str]) -> None:
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        for path, module in self._model.named_modules():
            name = plain_name(path)
            if isinstance(module, ModulesToSaveWrapper):
                for field, tensor in module.modules_to_save[ADAPTER].state_dict().items():
                    self._trained[f"{name}.{field}"] = tensor
            elif isinstance(module, TrainableTokensWrapper):
                self._tokens[f"{name}.weight"] = module.token_adapter
            elif isinstance(module, ParamWrapper):
                self._layers[f"{name}.{module.parameter_name}"] = module
            elif isinstance(module, LoraLayer):
                self._layers[f"{name}.weight"] = module
                if self._config.lora_bias:
                    self._layers[f"{name}.bias"] = module
        for name, tensor in list(self._trained.items()):
            if tensor.is_meta:  # saved under another name of the same tensor
                tied = (self._trained.get(each) for each in self.ties.get(name, ()))
                self._trained[name] = next(t for t in tied if t is not None and not t.is_meta)
        for path, tensor in self._model.state_dict().items():
            name = plain_name(path)
            if name in saved and not tensor.is_meta and name not in self._trained:
                # Embeddings that PEFT saves in addition, and biases of bias: all.
                for each in self.ties.get(name, {name}):
                    self._replaced.setdefault(each, tensor)


def model_without_weights(config: Any, kind: str, *, remote: bool = False) -> Any:
    """The model of a config on the meta device; None where transformers cannot build one.

    Args:
        kind: name of transformers' automatic class.
        remote: run the code that comes with the model.
    """
    import torch
    import transformers

    config = plain_config(config)
    try:
        with torch.device("meta"):
            return getattr(transformers, kind).from_config(config, trust_remote_code=remote)
    except (ValueError, KeyError, ImportError):
        return None  # not a model of this kind


def plain_config(config: Any) -> Any:
    """A copy of a config that builds plain modules whatever the stored weights are."""
    import copy

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def tied_names(model: Any) -> dict[str, set[str]]:
    """Name → every name of the same parameter, for parameters that have several."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def _config_of(adapter_dir: Path) -> tuple[Any, str | None]:
    """The adapter's config, and the initialisation where that has changed the base's weights."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter_dir))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"it is a {kind} adapter: only LoRA is merged into a base model")
    if config.layer_replication:
        raise ValueError(
            "peft_layer_replication gives the trained model more layers than the base has, and "
            "PEFT has no merge for that; load the adapter with PEFT instead"
        )
    init = config.init_lora_weights
    init = init.lower() if isinstance(init, str) else None
    if init is not None and init.startswith(("pissa_niter", "corda", "lora_ga")):
        raise ValueError(
            f"its initialisation, {init}, took a part out of the base's weights that cannot be "
            "computed again (it depends on random draws or on data), and the adapter does not hold "
            "it; train with peft_init_lora_weights: pissa to merge afterwards"
        )
    config.init_lora_weights = True  # nothing to look at yet: there are no weights
    config.lora_dropout = 0.0
    config.inference_mode = True
    return config, init if init in CHANGE_THE_BASE else None


def _attach(base: Any, config: Any) -> Any:
    import copy

    import torch
    from peft import get_peft_model

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ties and initialisation: nothing is trained
        try:
            trial = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
            trial.base_model.merge_adapter()
            return get_peft_model(copy.deepcopy(base), config)
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise ValueError(str(error).split(". ")[0]) from None


def _load(model: Any, adapter_dir: Path) -> Iterable[str]:
    """Load the adapter's tensors; their names in its file.

    Raises:
        ValueError: the adapter and the base do not fit; says where, as PEFT found it.
    """
    from peft import set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    saved = read_adapter_state(adapter_dir)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # Else PEFT moves what it loads to where the base's weights are: nowhere.
            module._move_adapter_to_device_of_base_layer = lambda *_args, **_keywords: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(model, dict(saved), low_cpu_mem_usage=True)
    except KeyError as error:
        raise ValueError(f"it has no {plain_name(error.args[0])}") from None
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    state = model.state_dict()
    # A tied copy may be saved under its other name; that of a table with other rows is saved twice.
    copies = ".modules_to_save."
    own = [name for name in result.missing_keys if f".{ADAPTER}" in name and copies not in name]
    if missing := [name for name in own if state[name].is_meta]:
        raise ValueError(f"it has no {plain_name(missing[0])}")
    if foreign := [name for name in result.unexpected_keys if copies not in name]:
        raise ValueError(f"the base has no {plain_name(foreign[0])}")
    return saved.keys()
