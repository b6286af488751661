"""A training step of each attention scheme, of larger tubelets and of fewer tokens, beside joint attention over single frames.

    python tests/bench/schemes.py [--frames 18] [--cases vitb2,vitb4] [--rounds 3] [--threads 2] [--dropout 0.1]

The steps of `step.py` (its model, adapters, pixels and loss; its naive LoRA with joint attention is another row),
taken in turn. "Times faster" is a median of ratios to joint attention with tubelets of one frame in the same round,
by processor time and by the clock; beside it is what the operations of forward and backward make of it. Slices of
ViT-B have as many layers as their name says.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from step import count_flops, in_turn, make_model, step_of

from tvit_cli import __version__
from tvit_cli.portable.config import ATTENTIONS

BASE = "joint"
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"attention": name} for name in ATTENTIONS},
    "joint, tubelets of 2": {"attention": "joint", "tubelet_size": 2},
    "joint, tubelets of 3": {"attention": "joint", "tubelet_size": 3},
    "divided, tubelets of 2": {"attention": "divided", "tubelet_size": 2},
    "joint, half of its tokens": {"attention": "joint", "token_drop": 0.5},
    "joint, tubelets of 2, half": {"attention": "joint", "tubelet_size": 2, "token_drop": 0.5},
}


def measure(case: str, dropout: float, rounds: int) -> dict[str, dict[str, float]]:
    """Per scheme: times faster than `joint`, by processor, clock and operations."""
    steps = {name: step_of(*make_model(case, "tvit", dropout, **shape)) for name, shape in KINDS.items()}
    steps["joint, naive LoRA"] = step_of(*make_model(case, "naive", dropout))
    work = {name: count_flops(step) for name, step in steps.items()}
    times = in_turn(steps, rounds)
    return {
        name: {
            "times_faster": statistics.median(j[0] / t[0] for j, t in zip(times[BASE], took, strict=True)),
            "times_faster_wall": statistics.median(
                j[1] / t[1] for j, t in zip(times[BASE], took, strict=True)
            ),
            "operations": work[BASE] / work[name],
            "cpu_seconds": statistics.median(t[0] for t in took),
            "wall_seconds": statistics.median(t[1] for t in took),
        }
        for name, took in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=18, help="a multiple of 2 and of 3")
    parser.add_argument("--cases", default="vitb2,vitb4", help="models and layers, as in step.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # PEFT loads transformers, which warns of optional packages
    results = {}
    for shape in options.cases.split(","):
        case = f"{shape}_t{options.frames}"
        results[case] = measure(case, options.dropout, options.rounds)
        print(case)
        for name, row in results[case].items():
            print(
                f"  {name:26} x {row['times_faster']:.2f} (by the clock {row['times_faster_wall']:.2f}, "
                f"by operations {row['operations']:.2f})", flush=True,
            )  # fmt: skip
    facts = {"tvit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"threads": options.threads, "dropout": options.dropout}
    print(json.dumps({"benchmark": "schemes", **facts, "results": results}))


if __name__ == "__main__":
    main()
