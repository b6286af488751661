"""What was trained with LoRA as a folder in PEFT's own format.

`PeftModel.from_pretrained` loads it onto the bare model: a `TemporalViT` with the weights that the training
started from. Format: `adapter_config.json` (a LoraConfig) beside `adapter_model.safetensors`.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tvit_cli.errors import ModelError, RunError
from tvit_cli.model.lora import ADAPTER, START_PARTS, adapted_layers, trainable_tensors
from tvit_cli.model.vit import TemporalViT

PREFIX = "base_model.model."  # PEFT's name of the model inside its own


def save_adapter(folder: Path, model: TemporalViT, *, base: str | None) -> None:
    """Writes all that a training with adapters changed; `base` names the weights it started from.

    What was trained in full (temporal embedding, excluded layers, biases) and the classifier, which the base
    weights lack, stand in the same file under their plain names. An adapter whose start was taken out of the base
    weights (PiSSA, OLoRA) is written for the whole base weights: what it adds and the start that it replaces,
    side by side in twice the rank. Raises ModelError for a model without adapters, RunError when the folder
    cannot be written.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ModelError("The model has no adapters; its folder holds its weights whole.")
    config: Any = copy.deepcopy(getattr(model, "peft_config")[ADAPTER])  # noqa: B009  (PEFT's, unknown to mypy)
    config.inference_mode, config.base_model_name_or_path = True, base
    classifier = {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
    tensors = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.cpu().clone()
        for name, tensor in {**trainable_tensors(model), **classifier}.items()
    }
    starts = {name: layer.start for name, layer in layers.items() if hasattr(layer, "start")}
    if starts:
        _double(config)
    for name, start in starts.items():
        for part, narrow, sign in zip(START_PARTS, (0, 1), (1, -1), strict=True):
            key = PREFIX + f"{name}.{part}".replace(f".{ADAPTER}.", ".")
            tensors[key] = torch.cat([tensors[key], sign * start[part].cpu()], dim=narrow)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder}: the adapter cannot be written ({error}). Choose another folder."
        ) from error


def _double(config: Any) -> None:
    """Twice the rank at the same scale: alpha / rank, or alpha / sqrt(rank)."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, factor * config.lora_alpha, True
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
