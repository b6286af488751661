"""Which parameters a training changes, and their tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tvit_cli.errors import ModelError
from tvit_cli.model.lora import ADAPTER, START_PARTS, LoraSpec, adapted_layers, attach
from tvit_cli.model.misfits import misfits
from tvit_cli.model.vit import TemporalViT


def set_trainable(model: TemporalViT, mode: str, spec: LoraSpec, *, seed: int) -> None:
    """Chooses the parameters that a training changes.

    lora        what `attach` says: adapters, classifier, additions; rank 0 the same without adapters
    all         every parameter
    classifier  the classifier, and what feeds it: the attentive pool, the norm of features
    last-N      the last N blocks, all that comes after them, and the additions, wherever they are

    Raises ModelError for a name in the spec that is no layer of the model, and for more blocks than there are.
    """
    if mode == "lora":
        attach(model, spec, seed=seed)
        return
    model.requires_grad_(mode == "all")
    for part in (model.pool, model.feature_norm, model.classifier):
        part.requires_grad_(True)
    if mode.startswith("last-"):
        count = int(mode.removeprefix("last-"))
        if count > len(model.blocks):
            raise ModelError(f"--train {mode}: the model has {len(model.blocks)} blocks. Give fewer, or all.")
        # The additions, too: beside image weights they start at nothing, and without them there is no time.
        for part in (*model.blocks[-count:], model.norm, model.summary, *model.additions().values()):
            part.requires_grad_(True)


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, under names that are the same in every process and after every restart.

    They share the model's memory.
    """
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def start_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' first weights where they were taken out of the base weights (PiSSA, OLoRA), else nothing.

    A checkpoint holds them beside the trainable tensors: the base weights that are left depend on them, and
    another machine's decomposition of the same weights may be another one. They share the model's memory.
    """
    return {
        f"start/{name}.{part}": tensor
        for name, layer in adapted_layers(model).items()
        for part, tensor in getattr(layer, "start", {}).items()
    }


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors, as `trainable_tensors` gives them, into the model.

    With those of `start_tensors` among them, the base weights become what is left without these. Raises
    ModelError, with the model untouched, when names or shapes differ.
    """
    starts = start_tensors(model) if any(name.startswith("start/") for name in tensors) else {}
    layers = {name: layer for name, layer in adapted_layers(model).items() if starts}
    before = {name: [layer.start[part].clone() for part in START_PARTS] for name, layer in layers.items()}
    copy_tensors(tensors, {**trainable_tensors(model), **starts})
    for name, layer in layers.items():
        now = [layer.start[part] for part in START_PARTS]
        if not all(map(torch.equal, before[name], now)):
            weight, scale = layer.get_base_layer().weight.detach(), layer.scaling[ADAPTER]
            weight += scale * (before[name][1] @ before[name][0] - now[1] @ now[0]).to(weight.device)


@torch.no_grad()
def copy_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into those of a run. Raises ModelError, with nothing copied, when they do not fit."""
    if problems := misfits(tensors, own):
        raise ModelError(
            f"The saved weights do not fit the model: {problems}. They were saved with other "
            "settings (--train, --lora-rank, --lora-target-modules); use those of their run."
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def trainable_report(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters, adapters included."""
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return trainable, sum(weight.numel() for weight in model.parameters())
