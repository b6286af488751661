"""An adapter on disk in PEFT's format, and the bare model beneath it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tvit_cli.model.folder import save_tensors
from tvit_cli.model.lora import ADAPTER, adapted_layers, adapter_names
from tvit_cli.model.trainable import trainable_tensors
from tvit_cli.model.vit import TemporalViT

ADAPTER_FILE = "adapter_model.safetensors"


def bare_state_dict(model: TemporalViT) -> dict[str, Tensor]:
    """The plain state dict of the model beneath its adapters. It shares the model's memory."""
    own = adapter_names(adapted_layers(model))
    state = model.state_dict()
    return {plain_name(name): tensor for name, tensor in state.items() if name not in own}


def plain_name(name: str) -> str:
    """A tensor's name without adapters. blocks.0.attention.q.base_layer.bias -> blocks.0.attention.q.bias"""
    return name.replace(".base_layer.", ".")


def save_adapter(model: TemporalViT, folder: Path, *, prefix: str, backbone: str) -> None:
    """Writes what training changed in PEFT's format, for a model that holds this one under `prefix`.

    Parts that were trained in full go along under `modules_to_save`. `backbone` is where the bare model is.
    """
    records: Any = model.peft_config  # PEFT left it there
    config = copy.copy(records[ADAPTER])
    adapters = adapter_names(adapted_layers(model))
    trained = trainable_tensors(model)
    whole = _trained_whole(model, adapters)
    config.target_modules = {prefix + name for name in adapted_layers(model)}
    config.modules_to_save = [prefix + name for name in whole]
    config.base_model_name_or_path = backbone
    config.init_lora_weights = True  # another start than zero would change the backbone when it is loaded
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {}
    for name in [*trained, *(name for name in adapters if name not in trained)]:
        stored = name.replace(f".{ADAPTER}", "") if name in adapters else name
        stored = stored.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        tensors[f"base_model.model.{prefix}{stored}"] = model.get_parameter(name).detach().contiguous()
    save_tensors(tensors, folder / ADAPTER_FILE, {"format": "pt"})


def _trained_whole(model: nn.Module, adapters: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are trained, and none of which is an adapter's."""
    whole: list[str] = []
    for name, module in model.named_modules():
        names = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
        is_inside = any(name.startswith(f"{outer}.") for outer in whole)
        is_trained = all(parameter.requires_grad for parameter in module.parameters())
        if names and is_trained and not is_inside and not adapters & set(names):
            whole.append(name)
    return whole
