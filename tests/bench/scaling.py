"""Cost against frames, clips in a batch, classes, processes, and clips of a data set.

    python tests/bench/scaling.py [--only TEXT] [--rounds 3] [--threads 2]

Steps: ViT-Ti/16 at 112 pixels with rank 8 on q, k, v, fc1 and fc2, forward and backward, processor seconds, medians
of steps taken in turn; beside each what the operations, as `--dry-run` counts them, would make of the smallest. A
clip of a single patch shows what a step costs however little it computes.
Processes: an update of 8 clips shared by one and by two processes of one thread each (gloo), seconds of the processor
in all of them and by the clock. Clips of a data set: what a training does with the list of its videos, read from the
index of a frame store that holds no frames, before its first step (open it, look 1,000 names up, list the videos),
at every epoch (draw its order) and at every checkpoint (the digest of the list); each size in a process of its own.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from step import TARGETS, current_memory, in_turn, peak_memory, step_of, timed
from stores import write_synthetic_index
from torch import nn
from torch.nn import functional as F

from tvit_cli import __version__
from tvit_cli.data.framestore import FrameStore
from tvit_cli.engine.distributed import all_reduce_gradients
from tvit_cli.engine.launch import make_accelerator
from tvit_cli.engine.train.batches import BatchPlan
from tvit_cli.engine.train.dryrun import count_flops
from tvit_cli.engine.train.fingerprint import fingerprint
from tvit_cli.engine.train.optim import adamw, parameter_groups
from tvit_cli.model import lora
from tvit_cli.portable.config import ATTENTIONS
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.settings.train import TrainSettings

FRAMES, BATCHES = (4, 8, 16, 32), (1, 2, 4, 8, 16)
CLASSES = (10, 100, 1_000, 10_000)
VIDEOS = (1_000, 10_000, 100_000, 1_000_000)
PROCESSES, SHARED_CLIPS, SHARED_STEPS = (1, 2), 8, 3
LOOKUPS = 1_000

Row = dict[str, float]
T = TypeVar("T")


def config(attention: str = "joint", frames: int = 8, classes: int = 101, size: int = 112) -> ViTConfig:
    return ViTConfig(
        num_classes=classes, frame_size=size, n_frames=frames, width=192, num_heads=3, attention=attention
    )


def make(shape: ViTConfig) -> nn.Module:
    model = build_model(shape, seed=0, from_scratch=True)
    lora.attach(model, lora.LoraSpec(8, 8, 0.0, False, "none", TARGETS, ()), seed=0)
    return model.train()


def measure_steps(cases: dict[int, tuple[ViTConfig, int]], rounds: int) -> dict[int, Row]:
    """Seconds of a step, times those of the first case, and its operations times the first's; by key, of a config
    and a number of clips."""
    steps = {}
    for key, (shape, clips) in cases.items():
        pixels = torch.randn(clips, shape.n_frames, 3, shape.frame_size, shape.frame_size)
        steps[key] = step_of(make(shape), pixels)
    times = {key: [cpu for cpu, _ in took] for key, took in in_turn(steps, rounds).items()}
    first = next(iter(cases))
    work = {key: count_flops(shape) * clips for key, (shape, clips) in cases.items()}
    return {
        key: {
            "seconds": statistics.median(took),
            "times": statistics.median(a / b for a, b in zip(took, times[first], strict=True)),
            "operations": work[key] / work[first],
        }
        for key, took in times.items()
    }


def measure_processes(rounds: int) -> dict[int, Row]:
    """Seconds of an update, and times those of one process."""
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in PROCESSES}
    for _ in range(rounds):
        for count in PROCESSES:
            answers = [json.loads(text) for text in run_group(count)]
            found[count].append((sum(a["cpu"] for a in answers), max(a["wall"] for a in answers)))
    base = found[PROCESSES[0]]

    def times(count: int, clock: int) -> float:
        return statistics.median(a[clock] / b[clock] for a, b in zip(found[count], base, strict=True))

    return {
        count: {
            "seconds": statistics.median(cpu for cpu, _ in rows),
            "times": times(count, 0),
            "wall_seconds": statistics.median(wall for _, wall in rows),
            "wall_times": times(count, 1),
        }
        for count, rows in found.items()
    }


def run_group(count: int) -> list[str]:
    """Output of each process that shares updates."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = []
    for rank in range(count):
        place = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, __file__, "--child-process"]
        group.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate()[0].splitlines()[-1] for process in group]
    assert not any(process.returncode for process in group)
    return answers


def share_updates() -> Row:
    """Processor and wall seconds of one process's part of an update: medians, the first left out."""
    torch.set_num_threads(1)
    accelerator = make_accelerator(device="cpu", mixed_precision="no")
    shape = config()
    model = make(shape)
    groups = parameter_groups(model, weight_decay=0.05, bias_weight_decay=False, norm_weight_decay=False)
    optimizer = adamw(groups, learning_rate=1e-4, betas=(0.9, 0.999), epsilon=1e-8)
    clips = torch.randn(SHARED_CLIPS // accelerator.num_processes, shape.n_frames, 3, 112, 112)
    labels = torch.zeros(len(clips), dtype=torch.int64)

    def update() -> None:
        F.cross_entropy(model(clips), labels).backward()
        all_reduce_gradients(model.parameters(), accelerator)
        optimizer.step()
        optimizer.zero_grad()

    took = [timed(update) for _ in range(SHARED_STEPS + 1)][1:]
    accelerator.end_training()
    return {"cpu": statistics.median(t[0] for t in took), "wall": statistics.median(t[1] for t in took)}


def measure_videos() -> dict[int, Row]:
    """Processor seconds and memory of what depends on the length of the list of videos."""
    rows = {}
    for videos in VIDEOS:
        with tempfile.TemporaryDirectory() as name:
            write_synthetic_index(Path(name) / "frames", videos)
            command = [sys.executable, __file__, "--child-index", str(Path(name) / "frames")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[videos] = json.loads(done.stdout.splitlines()[-1])
    return rows


def use_index(folder: Path) -> Row:
    """Processor seconds of each use of an index, and MiB that the process's peak grew by."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: imports are not the index's
    before = current_memory()
    found: Row = {}

    def part(name: str, work: Callable[[], T]) -> T:
        began = time.process_time()
        result = work()
        found[name] = time.process_time() - began
        return result

    store = part("open", lambda: FrameStore(folder))
    every = max(1, len(store) // LOOKUPS)
    names = [store.name(n) for n in range(0, len(store), every)][:LOOKUPS]
    part("look_up_1000", lambda: [store.find(name) for name in names])
    layout = part("list", lambda: store.layout())
    plan = BatchPlan(
        clips=len(layout.videos), batch_size=8, global_batch=8, processes=1, rank=0, epochs=1, seed=0
    )
    part("order_of_an_epoch", lambda: next(plan.micro_batches()))
    part(
        "digest_at_a_checkpoint",
        lambda: fingerprint(
            TrainSettings(), labels=layout.labels, training=[video.name for video in layout.videos], validation=[],
            base=None, network={}, frames="store", device="cpu", processes=1,
        ),
    )  # fmt: skip
    found["mebibytes"] = peak_memory() - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="the axes whose name contains this text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child-index", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child_process:
        print(json.dumps(share_updates()))
        return
    if options.child_index:
        print(json.dumps(use_index(options.child_index)))
        return
    torch.set_num_threads(options.threads)
    shapes = {
        **{
            f"frames, {attention}": {frames: (config(attention, frames), 1) for frames in FRAMES}
            for attention in ATTENTIONS
        },
        **{
            f"a single patch, {attention}": {1: (config(attention, 1, size=16), 1)}
            for attention in ATTENTIONS
        },
        "clips in a batch": {clips: (config(), clips) for clips in BATCHES},
        "classes": {classes: (config(classes=classes), 1) for classes in CLASSES},
    }
    axes: dict[str, Callable[[], dict[int, Row]]] = {
        name: lambda cases=cases: measure_steps(cases, options.rounds) for name, cases in shapes.items()
    }
    axes |= {"processes": lambda: measure_processes(options.rounds), "videos": measure_videos}
    results: dict[str, dict[int, Row]] = {}
    for name, measure in axes.items():
        if options.only in name:
            results[name] = measure()
            print(name)
            for key, row in results[name].items():
                print(f"  {key:9,}  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    facts = {"tvit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "scaling", **facts, "threads": options.threads, "results": results}))


if __name__ == "__main__":
    main()
