"""Time and memory of `tvit predict` on one clip, beside the floor: import torch and one forward pass.

    python tests/bench/predict.py [--runs 5] [--size base|small]

tvit, tvit with --int8, the floor, and the time to the first answer of 1,000 clips run in turn; medians and ratios are
printed, and one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from tvit_cli import __version__
from tvit_cli.data.video_writer import write_video
from tvit_cli.model.folder import save_model
from tvit_cli.model.linear import is_fast
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.settings.card import ModelCard, Preprocessing

SIZES = {"base": (768, 12, 12), "small": (384, 12, 6)}
ROOT = Path(__file__).parents[2]
FLOOR = """
import sys, torch
from torch.nn import functional as F
width, depth, heads, tokens = map(int, sys.argv[1:])
block = {n: torch.full((o, i), 0.01) for n, o, i in (  # one for all: drawing 85 million numbers is no floor
    ("qkv", 3 * width, width), ("proj", width, width), ("fc1", 4 * width, width), ("fc2", width, 4 * width))}
x = torch.zeros(1, tokens, width)
with torch.inference_mode():
    for _ in range(depth):
        qkv = F.linear(F.layer_norm(x, (width,)), block["qkv"])
        q, k, v = qkv.view(1, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), block["proj"])
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,)), block["fc1"])), block["fc2"])
"""


def make_model(folder: Path, size: str) -> ViTConfig:
    """A model folder with random weights and UCF101's number of classes."""
    width, depth, heads = SIZES[size]
    config = ViTConfig(num_classes=101, width=width, depth=depth, num_heads=heads)
    model = build_model(config, seed=0, from_scratch=True)
    card = ModelCard(
        tvit_version=__version__, labels=tuple(f"class{i:03d}" for i in range(101)), model=config.to_dict(),
        preprocessing=Preprocessing(n_frames=8, frame_size=224), weights_sha256="",
    )  # fmt: skip
    save_model(folder, model.state_dict(), card)
    return config


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """Wall seconds, peak memory in MB and processor seconds of a process."""
    started = time.perf_counter()
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert os.waitstatus_to_exitcode(status) == 0, process.stderr.read().decode() if process.stderr else ""
    return seconds, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def first_answer(arguments: list[str]) -> tuple[float]:
    """Wall seconds until a process that labels many videos prints the first answer; it is killed then."""
    started = time.perf_counter()
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*arguments, "--json"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        seconds = time.perf_counter() - started
        process.kill()
    return (seconds,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="base")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # By another process: one that is started from here begins with the peak memory of this one.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            config = other.submit(make_model, folder / "model", options.size).result()
        frames = np.random.default_rng(0).integers(0, 255, (180, 30, 40, 3)).astype(np.uint8)
        write_video(folder / "clip.avi", frames.repeat(8, 1).repeat(8, 2))
        tokens = 1 + config.n_frames * config.patches_per_frame
        (folder / "clips").mkdir()
        for number in range(1000):
            os.link(folder / "clip.avi", folder / "clips" / f"{number:03}.avi")
        shape = [config.width, config.depth, config.num_heads, tokens]
        tvit = [
            sys.executable, "-m", "tvit_cli", "predict", str(folder / "clip.avi"), "-m",
            str(folder / "model"),
        ]  # fmt: skip
        floor = [sys.executable, "-c", FLOOR, *map(str, shape)]
        programs = {"tvit predict": tvit, "tvit predict --int8": [*tvit, "--int8"], "floor": floor}
        many = [str(folder / "clips") if word.endswith("clip.avi") else word for word in tvit]
        rounds: list[dict[str, tuple[float, ...]]] = [
            {name: measure(program) for name, program in programs.items()} | {"first": first_answer(many)}
            for _ in range(options.runs + 1)
        ]
    del rounds[0]  # which fills the disk's cache

    def median(name: str, of: int) -> float:
        return statistics.median(found[name][of] for found in rounds)

    def ratio(name: str, of: int, base: str = "floor") -> float:
        return statistics.median(found[name][of] / found[base][of] for found in rounds)

    weights = sum(p.numel() for p in build_model(config, seed=0, from_scratch=True).parameters()) * 4 / 2**20
    print(
        f"ViT-{options.size}, 8 frames, weights of {weights:.0f} MB; the floor is import torch + a forward pass"
    )
    for name in programs:
        print(
            f"{name:20} {median(name, 0):5.2f} s, {median(name, 2):5.2f} s of the processor, "
            f"{median(name, 1):.0f} MB; x {ratio(name, 0):.2f} and {ratio(name, 2):.2f} the floor"
        )
    print(
        f"first answer of 1,000 clips: {median('first', 0):.2f} s, x {ratio('first', 0, 'tvit predict'):.2f} of one clip"
    )
    facts = {
        "benchmark": "predict",
        "size": options.size,
        "seconds": median("tvit predict", 0),
        "floor_seconds": median("floor", 0),
        "ratio": ratio("tvit predict", 0),
        "cpu_ratio": ratio("tvit predict", 2),
        "megabytes": median("tvit predict", 1),
        "int8_is_fast": is_fast(),  # else it is left out
        "int8_seconds": median("tvit predict --int8", 0),
        "int8_ratio": ratio("tvit predict --int8", 0, "tvit predict"),
        "int8_cpu_ratio": ratio("tvit predict --int8", 2, "tvit predict"),
        "int8_megabytes": median("tvit predict --int8", 1),
        "first_of_1000_seconds": median("first", 0),
        "first_of_1000_ratio": ratio("first", 0, "tvit predict"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
