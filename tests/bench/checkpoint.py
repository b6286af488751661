"""A checkpoint of ViT-B with adapters of rank 8 on q, k, v: its size, and the time it takes to write.

    python tests/bench/checkpoint.py

224 pixels, 8 frames, 101 classes, random weights; the optimizer's state and the best epoch's tensors included. Each
time is that of `save_checkpoint`, files and folder synced, the step before it pruned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tvit_cli.engine.train.checkpoint import (  # noqa: E402
    State,
    load_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from tvit_cli.engine.train.optim import adamw, parameter_groups  # noqa: E402
from tvit_cli.model import lora  # noqa: E402
from tvit_cli.model.lora import set_trainable, trainable_tensors  # noqa: E402
from tvit_cli.portable.vit import TemporalViT, ViTConfig  # noqa: E402

VIT_B = ViTConfig(
    num_classes=101, frame_size=224, patch_size=16, n_frames=8, width=768, depth=12, num_heads=12
)
RANK_8 = lora.LoraSpec(
    rank=8, alpha=8, dropout=0.1, use_rslora=False, bias="none", targets=("q", "k", "v"), exclude=()
)


def adapted_vit_b() -> TemporalViT:
    """ViT-B with the adapters; its values do not matter."""
    model = TemporalViT(VIT_B, initialise=False)
    set_trainable(model, "lora", RANK_8, seed=0)
    return model


def optimizer_after_a_step(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the moments that a checkpoint holds."""
    groups = parameter_groups(model, weight_decay=0.1, bias_weight_decay=False, norm_weight_decay=False)
    optimizer = adamw(groups, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder")
    options = parser.parse_args()
    model = adapted_vit_b()
    optimizer = optimizer_after_a_step(model)
    writing, reading = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for step in range(1, options.rounds + 1):
            tensors = trainable_tensors(model)
            started = time.perf_counter()
            path = save_checkpoint(
                Path(name),
                state=State(step=step, tally=(1.0, 2.0, 3.0)),
                trainable=tensors,
                optimizer=optimizer_tensors(optimizer, model),
                best=tensors,
            )
            prune_checkpoints(Path(name), 1, newest=step)
            writing.append(time.perf_counter() - started)
            started = time.perf_counter()
            load_checkpoint(path)
            reading.append(time.perf_counter() - started)
        sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    print(
        json.dumps(
            {
                "benchmark": "checkpoint",
                "bytes": {**sizes, "all": sum(sizes.values())},
                "write ms": {"median": _ms(statistics.median(writing)), "most": _ms(max(writing))},
                "read and verify ms": _ms(statistics.median(reading)),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
        )
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


if __name__ == "__main__":
    main()
