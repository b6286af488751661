"""Where this process stands among those that share a piece of work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tvit_cli.engine.trained import pick_device


@dataclass(frozen=True)
class Place:
    """Rank of this process, how many there are, its device, and how their results come together.

    `gather` gives every process the objects of all, in the order of their ranks.
    """

    rank: int
    processes: int
    device: torch.device
    gather: Callable[[Any], list[Any]]

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0


def join_processes(device: str) -> Place:
    """This process's place, as torchrun, `accelerate launch` or `--num-processes` started it.

    Raises ModelError when this machine has no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Place(0, 1, pick_device(device), lambda own: [own])
    from accelerate.utils import (
        gather_object,  # only here: importing it takes longer than scoring a few videos
    )

    from tvit_cli.engine.launch import make_accelerator

    accelerator = make_accelerator(device=device, mixed_precision="no")
    return Place(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        lambda own: list(gather_object([own])),
    )
