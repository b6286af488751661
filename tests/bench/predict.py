"""Time and memory of `tvit predict` on one clip, beside the floor: import torch and one forward pass.

    python tests/bench/predict.py [--runs 5] [--size base|small]

A (tvit) and B (floor) run in turn; medians and their ratio are printed, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tvit_cli import __version__
from tvit_cli.data.writer import write_video
from tvit_cli.model.folder import save_model
from tvit_cli.model.vit import ViTConfig, build_model
from tvit_cli.settings.card import ModelCard, Preprocessing

SIZES = {"base": (768, 12, 12), "small": (384, 12, 6)}
ROOT = Path(__file__).parents[2]
FLOOR = """
import sys, torch
from torch.nn import functional as F
width, depth, heads, tokens = map(int, sys.argv[1:])
blocks = [{n: torch.empty(o, i).uniform_(-.02, .02) for n, o, i in (
    ("qkv", 3 * width, width), ("proj", width, width), ("fc1", 4 * width, width), ("fc2", width, 4 * width))}
    for _ in range(depth)]
x = torch.zeros(1, tokens, width)
with torch.inference_mode():
    for b in blocks:
        qkv = F.linear(F.layer_norm(x, (width,)), b["qkv"])
        q, k, v = qkv.view(1, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), b["proj"])
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,)), b["fc1"])), b["fc2"])
"""


def make_model(folder: Path, size: str) -> ViTConfig:
    """A model folder with random weights and UCF101's number of classes."""
    width, depth, heads = SIZES[size]
    config = ViTConfig(num_classes=101, width=width, depth=depth, num_heads=heads)
    model = build_model(config, seed=0, from_scratch=True)
    card = ModelCard(
        tvit_version=__version__,
        labels=tuple(f"class{i:03d}" for i in range(101)),
        model=config.to_dict(),
        preprocessing=Preprocessing(n_frames=8, frame_size=224),
        weights_sha256="",
    )
    save_model(folder, model.state_dict(), card)
    return config


def measure(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in MB of a process."""
    started = time.perf_counter()
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert os.waitstatus_to_exitcode(status) == 0, process.stderr.read().decode() if process.stderr else ""
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="base")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_model(folder / "model", options.size)
        frames = np.random.default_rng(0).integers(0, 255, (180, 30, 40, 3)).astype(np.uint8)
        write_video(folder / "clip.avi", frames.repeat(8, 1).repeat(8, 2))
        tokens = 1 + config.n_frames * config.patches_per_frame
        shape = [config.width, config.depth, config.num_heads, tokens]
        tvit = [
            sys.executable,
            "-m",
            "tvit_cli",
            "predict",
            str(folder / "clip.avi"),
            "-m",
            str(folder / "model"),
        ]
        floor = [sys.executable, "-c", FLOOR, *map(str, shape)]
        measure(tvit)
        measure(floor)
        pairs = [(measure(tvit), measure(floor)) for _ in range(options.runs)]
    a, b = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    memory = [statistics.median(pair[i][1] for pair in pairs) for i in (0, 1)]
    ratio = statistics.median(pair[0][0] / pair[1][0] for pair in pairs)
    weights = sum(p.numel() for p in build_model(config, seed=0, from_scratch=True).parameters()) * 4 / 2**20
    print(
        f"tvit predict, ViT-{options.size}, 8 frames: {a:.2f} s, {memory[0]:.0f} MB (weights {weights:.0f})"
    )
    print(f"import torch + one forward pass:       {b:.2f} s, {memory[1]:.0f} MB")
    print(f"ratio of times, median over {options.runs} pairs: {ratio:.2f}")
    facts = {
        "benchmark": "predict",
        "size": options.size,
        "seconds": a,
        "floor_seconds": b,
        "ratio": ratio,
        "megabytes": memory[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
