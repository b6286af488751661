"""Gradients of adapters under DDP and FSDP on two processes, against one process.

Where they agree, each process leaves an empty file for either in the folder that it is given.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tvit_cli.model import lora
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model

CLASSES = 3


def make_model() -> TemporalViT:
    config = ViTConfig(
        num_classes=CLASSES, n_frames=2, frame_size=16, patch_size=8, width=16, depth=2, num_heads=2
    )
    model = build_model(config, seed=0, from_scratch=True)
    lora.attach(model, lora.LoraSpec(2, 4, 0.0, False, "none", ("q", "v", "fc1", "fc2"), ()), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at 0 nothing would come through it
            nn.init.normal_(parameter, generator=generator)
    return model.train()


def gradients(model: nn.Module, clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """By name; those of a sharded model are gathered."""
    nn.functional.cross_entropy(model(clips), labels).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            whole: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.")] = whole.clone()
    return found


def main() -> None:
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    clips = torch.randn(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 1])
    right = gradients(make_model(), clips, labels)
    sharded = make_model()
    mesh = init_device_mesh("cpu", (processes,))
    for part in (*sharded.blocks, sharded):
        fully_shard(part, mesh=mesh)
    for name, model in (("DDP", DistributedDataParallel(make_model())), ("FSDP", sharded)):
        found = gradients(model, clips[rank::processes], labels[rank::processes])
        assert found.keys() == right.keys(), name
        assert any("lora_A" in key for key in found), name
        for key, value in right.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")
        Path(sys.argv[1], f"{name} {rank}").touch()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
