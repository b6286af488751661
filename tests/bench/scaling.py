"""How the cost of a step grows: with frames, with clips in a batch, with classes; and of a label list with classes.

    python tests/bench/scaling.py [--rounds 3] [--threads 2] [--plot scaling.png]

ViT-Ti/16 at 112 pixels with rank 8 on q, k, v, fc1 and fc2, forward and backward, processor seconds, medians of steps
taken in turn. Beside each is what the operations, as `--dry-run` counts them, would make of the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from step import TARGETS, step_of, timed

from tvit_cli import __version__
from tvit_cli.model import lora
from tvit_cli.model.flops import count_flops
from tvit_cli.model.vit import ViTConfig, build_model
from tvit_cli.report.charts import Curve, curves_chart
from tvit_cli.report.drawing import Role
from tvit_cli.report.png import to_png

FRAMES, BATCHES, CLASSES = (4, 8, 16, 32), (1, 2, 4, 8), (10, 100, 1_000, 10_000)


def config(attention: str = "joint", frames: int = 8, classes: int = 101) -> ViTConfig:
    return ViTConfig(
        num_classes=classes, frame_size=112, n_frames=frames, width=192, num_heads=3, attention=attention
    )


def measure(cases: dict[int, tuple[ViTConfig, int]], rounds: int) -> dict[int, float]:
    """Median processor seconds of a step: by key, of a config and a number of clips."""
    steps = {}
    for key, (shape, clips) in cases.items():
        model = build_model(shape, seed=0, from_scratch=True)
        lora.attach(model, lora.LoraSpec(8, 8, 0.0, False, "none", TARGETS, ()), seed=0)
        pixels = torch.randn(clips, shape.n_frames, 3, shape.frame_size, shape.frame_size)
        steps[key] = step_of(model.train(), pixels)
    times: dict[int, list[float]] = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            took = timed(step)[0]
            if number:
                times[key].append(took)
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="draw times over the smallest, by frames")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    groups = {
        **{
            f"frames, {attention}": {frames: (config(attention, frames), 1) for frames in FRAMES}
            for attention in ("joint", "divided", "space")
        },
        "clips in a batch": {clips: (config(), clips) for clips in BATCHES},
        "classes": {classes: (config(classes=classes), 1) for classes in CLASSES},
    }
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name, cases in groups.items():
        found = measure(cases, options.rounds)
        first = next(iter(cases))
        work = {key: count_flops(shape) * clips for key, (shape, clips) in cases.items()}
        results[name] = {
            key: {"seconds": took, "times": took / found[first], "operations": work[key] / work[first]}
            for key, took in found.items()
        }
        print(name)
        for key, row in results[name].items():
            print(
                f"  {key:6}  {1e3 * row['seconds']:8.1f} ms  x {row['times']:.2f}  (operations x {row['operations']:.2f})"
            )
    facts = {"tvit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "scaling", **facts, "threads": options.threads, "results": results}))
    if options.plot:
        roles: tuple[Role, ...] = ("one", "two", "three")
        named = [(n.removeprefix("frames, "), rows) for n, rows in results.items() if n.startswith("frames")]
        curves = [
            Curve(name, [(float(key), row["times"]) for key, row in rows.items()], role)
            for (name, rows), role in zip(named, roles, strict=True)
        ]
        title = "Time of a step over that of 4 frames"
        drawing = curves_chart(title, curves, x_name="frames", show=lambda times: f"{times:g}")
        assert drawing is not None
        options.plot.write_bytes(to_png(drawing))


if __name__ == "__main__":
    main()
