"""Random draws that depend on what they are for alone: on (seed, kind, epoch, index), never on a state."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Kind(IntEnum):
    """What is drawn. Each kind has numbers of its own, so that one more or fewer leaves the others as they were."""

    OFFSETS = 0  # which frame of each segment
    ORDER = 1  # of shuffled frames
    AUGMENTATION = 2  # crop, flip, colour jitter
    RANDAUGMENT = 3
    ERASING = 4
    MIXING = 5


def draw_generator(seed: int, kind: Kind, *key: int) -> np.random.Generator:
    """Well mixed for neighbouring seeds and keys, unlike `seed + index`."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(kind, *key)))
