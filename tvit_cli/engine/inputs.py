"""What one forward pass of a training is given: clips, augmented and mixed on the device, and their targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tvit_cli.data.clips import ClipBatch
from tvit_cli.data.mixing import Mixing, mix
from tvit_cli.data.pixels import moved
from tvit_cli.data.transforms import Augmentation, train_transform
from tvit_cli.engine.batches import MicroBatch
from tvit_cli.engine.objective import Targets
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.train import TrainSettings


def short_side(settings: TrainSettings) -> int:
    """Short side of the frames that workers hand over: the smallest crop still has the model's resolution."""
    return math.ceil(settings.img_size / math.sqrt(settings.crop_scale_min))


def make_inputs(
    planned: MicroBatch,
    batch: ClipBatch,
    *,
    settings: TrainSettings,
    preprocessing: Preprocessing,
    device: torch.device,
) -> tuple[Tensor, Targets]:
    """The clips (B, T, C, S, S) of a planned pass, from what was read for it, and their targets.

    Unreadable clips weigh nothing, nor do those beyond `planned.real`; a clip whose partner cannot be read is
    left unmixed.
    """
    clips = train_transform(
        batch.clips,
        batch.epochs,
        batch.indices,
        augmentation=_augmentation(settings),
        preprocessing=preprocessing,
        seed=settings.seed,
        device=device,
    )
    labels = moved(batch.labels, device)
    own = len(planned.keys)
    weights = batch.weights[:own].clone()
    weights[planned.real :] = 0
    weights = moved(weights, device)
    if not planned.partners:
        return clips, Targets(labels, weights)
    partners = [other if batch.weights[other] else place for place, other in enumerate(planned.partners)]
    others = moved(batch.labels[partners], device)
    mixing = Mixing(mixup=settings.mixup, cutmix=settings.cutmix)
    clips, shares = mix(clips, partners, batch.epochs, batch.indices, mixing=mixing, seed=settings.seed)
    return clips, Targets(labels[:own], weights, others, shares)


def _augmentation(settings: TrainSettings) -> Augmentation:
    return Augmentation(
        crop_scale=(settings.crop_scale_min, 1.0),
        horizontal_flip=settings.horizontal_flip,
        brightness=settings.brightness,
        contrast=settings.contrast,
        saturation=settings.saturation,
        hue=settings.hue,
        randaugment=settings.randaugment,
        randaugment_magnitude=settings.randaugment_magnitude,
        random_erasing=settings.random_erasing,
    )
