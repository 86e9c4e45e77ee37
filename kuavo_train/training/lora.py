"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the action expert, through peft.

Of every linear layer of the expert W stays as it is, and B A is learnt beside it, of a low rank. That is so only while
a stage trains: a checkpoint holds W + (alpha / rank) B A as its weight, so that any LeRobot tool opens it and the next
stage begins with adapters of its own. What training is resumed from, W, A and B apart, is in the training state.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from torch import Tensor, nn

from kuavo_train.config import LoraConfig
from kuavo_train.errors import ConfigError
from kuavo_train.training.parameter_groups import parameter_groups, trainable_parameters

ADAPTED_GROUP = "expert"
ADAPTER = "default"  # peft's name of a model's only adapter


def add_adapters(policy: nn.Module, lora: LoraConfig | None) -> None:
    """Put adapters on the expert's linear layers, which compute what they did before until the first step.

    The expert's own parameters are held fixed; what else is trained stays trained. None adds nothing.

    Raises:
        ConfigError: the policy has no expert, or it is frozen.
    """
    if lora is None:
        return
    trained = trainable_parameters(policy)
    expert = set(parameter_groups(policy).get(ADAPTED_GROUP, ()))
    if not expert & trained.keys():
        state = "a frozen one (training.freeze)" if expert else "a policy without one"
        raise ConfigError(f"training.lora must have an expert to adapt, got {state}; set training.lora=null")
    layers = [
        name for name, module in policy.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in expert
    ]
    inject_adapter_in_model(PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=layers), policy)
    for name in trained.keys() - expert:  # peft has frozen everything but its adapters
        trained[name].requires_grad_(True)


def merge_adapters(policy: nn.Module) -> dict[str, AdaptedLinear]:
    """Put plain layers with the merged weights, open to training, in place of adapted ones; returns those by name."""
    adapted = _adapted_layers(policy)
    for name, layer in adapted.items():
        plain: nn.Linear = deepcopy(layer.get_base_layer())  # type: ignore[assignment]
        with torch.no_grad():
            plain.weight += layer.get_delta_weight(ADAPTER).to(plain.weight.dtype)
        policy.set_submodule(name, plain.requires_grad_(True))
    return adapted


@contextmanager
def adapters_merged(policy: nn.Module) -> Iterator[None]:
    """Within it the policy is a plain one, as it is saved; afterwards it has its adapters again, unchanged."""
    adapted = merge_adapters(policy)
    try:
        yield
    finally:
        for name, layer in adapted.items():
            policy.set_submodule(name, layer)


def adapted_state(policy: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Adapted layer → its weight and its adapter's, apart, which merged weights no longer show."""
    return {name: layer.state_dict() for name, layer in _adapted_layers(policy).items()}


def restore_adapted(policy: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give the adapted layers what `adapted_state` returned.

    Raises:
        ConfigError: other layers were adapted, or with another rank.
    """
    layers = _adapted_layers(policy)
    then, now = ({name: _shapes(of) for name, of in each.items()} for each in (state, adapted_state(policy)))
    if then != now:
        raise ConfigError(
            f"training.lora must be as when the stage began, with {_described(then)}, got {_described(now)}; set it "
            "back, or begin the stage anew"
        )
    for name, layer in layers.items():
        layer.load_state_dict(state[name])


def _adapted_layers(policy: nn.Module) -> dict[str, AdaptedLinear]:
    return {name: module for name, module in policy.named_modules() if isinstance(module, AdaptedLinear)}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _described(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    ranks = {shape[0] for layer in shapes.values() for name, shape in layer.items() if name.startswith("lora_A.")}
    return f"{len(shapes)} adapted layers" + "".join(f" of rank {rank}" for rank in sorted(ranks))
