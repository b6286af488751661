"""LoRA adapters, and which parameters a training changes; the only file that names PEFT.

PEFT costs seconds to import, so it is imported where it is used. Source of LoRA: arXiv:2106.09685.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tvit_cli.errors import ModelError
from tvit_cli.model.vit import TemporalViT
from tvit_cli.settings.train import LORA_TARGETS

TrainMode = Literal["lora", "all", "classifier"]
LoraBias = Literal["none", "lora_only", "all"]


@dataclass(frozen=True)
class LoraSpec:
    """Which adapters to attach.

    Targets and exclude hold short names (`q`: every layer of that name) or full ones
    (`blocks.3.attention.q`).
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    bias: LoraBias
    targets: tuple[str, ...]
    exclude: tuple[str, ...]


def set_trainable(model: TemporalViT, mode: TrainMode, spec: LoraSpec, *, seed: int) -> None:
    """Chooses the parameters that a training changes.

    lora        what `attach` says: adapters, classifier, additions; rank 0 the same without adapters
    all         every parameter
    classifier  the classifier, and the attentive pool that feeds it

    Raises ModelError for a name in the spec that is no layer of the model.
    """
    if mode == "lora":
        attach(model, spec, seed=seed)
    else:
        model.requires_grad_(mode == "all")
        model.pool.requires_grad_(True)
        model.classifier.requires_grad_(True)


def attach(model: TemporalViT, spec: LoraSpec, *, seed: int) -> None:
    """Puts adapters on the targets, in place; their first weights depend on the seed alone.

    Trainable are then the adapters, in full the parts that an image ViT lacks, the classifier (unless it is a
    target itself) and the excluded layers, and biases: none, those of the layers with an adapter
    (`lora_only`), or all. An excluded layer gets no adapter, target or not, and learns its own weights, as
    in the reference. Rank 0 attaches no adapter.

    Raises ModelError for a name that is no layer of the model, and when no layer is left for an adapter.
    """
    assert not _adapted(model), "adapters are attached once"
    excluded = resolve_layers(model, spec.exclude, option="lora_exclude_modules")
    wanted = resolve_layers(model, spec.targets, option="lora_target_modules")
    targets = [name for name in wanted if name not in excluded] if spec.rank else []
    if spec.rank and not targets:
        raise ModelError(
            f"No layer is left for an adapter: lora_target_modules is {','.join(spec.targets) or 'empty'}, "
            f"lora_exclude_modules is {','.join(spec.exclude) or 'empty'}. Name another target, or train "
            "without adapters: --lora-rank 0."
        )
    if targets:
        _inject(model, targets, spec, seed)
    adapted = _adapted(model)
    assert sorted(adapted) == sorted(targets), "PEFT adapts the layers that were named, and no other"

    own = _adapter_names(adapted)
    model.requires_grad_(False)
    for addition in model.additions().values():
        addition.requires_grad_(True)
    model.classifier.requires_grad_("classifier" not in targets)
    for name in excluded:
        model.get_submodule(name).requires_grad_(True)
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if name in own or (leaf == "bias" and spec.bias == "all"):
            parameter.requires_grad_(True)
        if leaf == "bias" and spec.bias == "lora_only" and layer.removesuffix(".base_layer") in adapted:
            parameter.requires_grad_(True)


def resolve_layers(model: TemporalViT, names: Iterable[str], *, option: str) -> list[str]:
    """Full names of the layers meant; a short name is every layer whose last part it is.

    `["q"]` in a model of two blocks -> `["blocks.0.attention.q", "blocks.1.attention.q"]`. Layers of the parts
    that an image ViT lacks are not among them: those are trained in full. Raises ModelError, naming the option,
    for a name that is no layer.
    """
    additions = tuple(f"{name}." for name in model.additions())
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and name.rpartition(".")[2] in LORA_TARGETS
        and not name.startswith(additions)
    ]
    meant: set[str] = set()
    for wanted in names:
        found = [name for name in layers if wanted in (name, name.rpartition(".")[2])]
        if not found:
            close = difflib.get_close_matches(wanted, [*LORA_TARGETS, *layers], n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ModelError(
                f"{option}: {wanted!r} is no layer of the model.{hint} Legal names are "
                f"{', '.join(LORA_TARGETS)}, or one layer in full, such as blocks.0.attention.q."
            )
        meant.update(found)
    return [name for name in layers if name in meant]


@torch.no_grad()
def merge(model: TemporalViT) -> None:
    """Folds the adapters into the layers they sit on, in place; without adapters it does nothing.

    The model is then a plain one again, with the plain names in its state dict.
    """
    for name, layer in _adapted(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):  # PEFT leaves its own record on the model
        del model.peft_config


@torch.no_grad()
def merged_state_dict(model: TemporalViT) -> dict[str, Tensor]:
    """The state dict that `merge` would leave, bit for bit, with the model as it is.

    Layers without an adapter share the model's memory: write them, or copy them, before the next step.
    """
    adapted = _adapted(model)
    own = _adapter_names(adapted)
    merged: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer, is_base, leaf = name.partition(".base_layer.")
        if not is_base and name not in own:
            merged[name] = tensor
        elif is_base and leaf == "weight":
            (adapter,) = adapted[layer].active_adapters
            merged[f"{layer}.weight"] = tensor + adapted[layer].get_delta_weight(adapter)
        elif is_base:
            merged[f"{layer}.{leaf}"] = tensor
    return merged


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, under names that are the same in every process and after every restart.

    They share the model's memory.
    """
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors, as `trainable_tensors` gives them, into the model.

    Raises ModelError, with the model untouched, when names or shapes differ.
    """
    copy_tensors(tensors, trainable_tensors(model))


@torch.no_grad()
def copy_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into those of a run. Raises ModelError, with nothing copied, when they do not fit."""
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in own]
    problems += [
        f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ModelError(
            f"The saved weights do not fit the model: {'; '.join(problems[:4])}{more}. They were saved with "
            "other settings (--train, --lora-rank, --lora-target-modules); use those of their run."
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def trainable_report(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters, adapters included."""
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return trainable, sum(weight.numel() for weight in model.parameters())


def _inject(model: TemporalViT, targets: list[str], spec: LoraSpec, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU, then moves the adapter to its layer
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Layers that hold an adapter (PEFT's `LoraLayer`s), told by `base_layer` so that PEFT stays unloaded."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
    }


def _adapter_names(adapted: Mapping[str, nn.Module]) -> set[str]:
    """Full names of the adapters' own tensors, without those of the layers beneath them."""
    return {
        f"{layer}.{name}"
        for layer, module in adapted.items()
        for name in module.state_dict()
        if not name.startswith("base_layer.")
    }
