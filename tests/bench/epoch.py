"""A whole epoch of training beside its steps alone: overhead of reading, loop and epoch end.

    python tests/bench/epoch.py [--data FOLDER] [--weights FOLDER] [--rounds 3] [--clips 24] [--workers N] [--threads 2]

Three trainings of one epoch in turn, with the recipe of examples/configs/leave_people_out.toml (ViT-S/14, 98 pixels,
8 frames): from a frame store, from videos, and on the store's batches, which are in memory already. The training is
the product's own, from its first batch to its checkpoint; "steps" is the sum of the forward and backward passes
(augmentation included) and updates of the one in memory. The clips are 180 frames of 320x240 that weigh what
UCF101's do, or those of a folder; the weights are random, or those of a folder. Processor seconds count worker
processes, too.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from data import make_clips

from tvit_cli import __version__
from tvit_cli.data.clips import ClipBatch
from tvit_cli.data.layout import Video, read_layout
from tvit_cli.engine import train
from tvit_cli.engine.extract import extract
from tvit_cli.engine.train import loop
from tvit_cli.engine.train.state import Loop
from tvit_cli.model.folder import save_model
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import EpochDone, Event, silent
from tvit_cli.settings.base import load
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.train import TrainSettings

CONFIG = Path(__file__).parents[2] / "examples" / "configs" / "leave_people_out.toml"
KINDS = ("memory", "store", "videos")


@dataclass
class Seconds:
    """By the clock and of the processor."""

    wall: float = 0.0
    cpu: float = 0.0

    def add(self, since: "Seconds") -> None:
        now = Seconds.now()
        self.wall += now.wall - since.wall
        self.cpu += now.cpu - since.cpu

    @classmethod
    def now(cls) -> "Seconds":
        """Of this process and of the children that have ended."""
        used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used))


@dataclass
class Epoch:
    """Time of an epoch and of its steps, and the share spent waiting for data."""

    whole: Seconds
    steps: Seconds
    data_wait: float = 0.0


def run_epoch(settings: TrainSettings, batches: list[ClipBatch] | None, keep: list[ClipBatch]) -> Epoch:
    """Train, on these batches if there are any; those that the training reads are added to `keep`."""
    found = Epoch(Seconds(), Seconds())
    read, fit = loop._batches, train.fit

    def timed(work: Callable[..., Any], total: Seconds) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            since = Seconds.now()
            try:
                return work(*given)
            finally:
                total.add(since)

        return wrapped

    def own_batches(state: Loop) -> Iterator[ClipBatch]:
        if batches is not None:
            yield from batches
            return
        for batch in read(state):
            keep.append(batch)
            yield batch

    def watch(event: Event) -> None:
        if isinstance(event, EpochDone):
            found.data_wait = event.metrics["data_wait"]

    with ExitStack() as changed:
        for place, name, value in (
            (loop, "_batches", own_batches),
            (loop, "forward_backward", timed(loop.forward_backward, found.steps)),
            (loop, "update", timed(loop.update, found.steps)),
            (train, "fit", timed(fit, found.whole)),
        ):
            changed.enter_context(mock.patch.object(place, name, value))
        train.train(settings, watch)
    return found


def write_manifest(folder: Path, videos: list[Video]) -> Path:
    """A list of videos in a folder of its own, beside which a frame store may lie."""
    folder.mkdir()
    path = folder / "clips.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "subset"])
        writer.writerows([video.path.resolve(), video.label, "train"] for video in videos)
    return path


def make_weights(folder: Path, config: ViTConfig) -> Path:
    """A model folder of random weights, of a model for two classes."""
    card = ModelCard(
        tvit_version=__version__,
        labels=("a", "b"),
        model=config.to_dict(),
        preprocessing=Preprocessing(n_frames=config.n_frames, frame_size=config.frame_size),
        weights_sha256="",
    )
    save_model(folder, build_model(config, seed=0, from_scratch=True).state_dict(), card)
    return folder


def measure(
    videos: list[Video], weights: Path | None, folder: Path, options: argparse.Namespace
) -> dict[str, list[Epoch]]:
    """Epochs of each kind, in turn; the first round warms up and is left out."""
    manifests = {kind: write_manifest(folder / kind, videos) for kind in KINDS}
    for kind in ("memory", "store"):
        store = ExtractSettings(
            path_to_data=str(manifests[kind]), num_workers=0, val_groups="none", test_groups="none"
        )
        extract(store, silent)
    flags: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "test_groups": "none", "test_at_end": False}
    flags |= {"device": "cpu", "mixed_precision": "no", "working_directory": folder / "runs"}
    flags |= {"num_workers": options.workers}
    recipe = load(TrainSettings, config=CONFIG, flags=flags, environ={}).settings
    if weights is None:
        vits = ViTConfig(
            num_classes=2, frame_size=recipe.img_size, patch_size=14, width=384, depth=12, num_heads=6
        )
        weights = make_weights(folder / "weights", vits)
    batches: list[ClipBatch] = []
    found: dict[str, list[Epoch]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind in ("store", "memory", "videos") if number == 0 else KINDS:
            settings = recipe.model_copy(
                update={"hf_model_name": str(weights), "path_to_data": str(manifests[kind])}
            )
            first = number == 0 and kind == "store"
            epoch = run_epoch(settings, batches if kind == "memory" else None, batches if first else [])
            if number:
                found[kind].append(epoch)
    return found


def summary(found: dict[str, list[Epoch]]) -> dict[str, dict[str, float]]:
    """Medians and ratios to the sum of the steps of the epoch in memory of the same round."""
    results = {}
    for kind, epochs in found.items():
        pairs = [(epoch.whole, alone.steps) for epoch, alone in zip(epochs, found["memory"], strict=True)]
        results[kind] = {
            "wall_ratio": statistics.median(whole.wall / steps.wall for whole, steps in pairs),
            "cpu_ratio": statistics.median(whole.cpu / steps.cpu for whole, steps in pairs),
            "wall_seconds": statistics.median(epoch.whole.wall for epoch in epochs),
            "cpu_seconds": statistics.median(epoch.whole.cpu for epoch in epochs),
            "own_steps_wall_seconds": statistics.median(epoch.steps.wall for epoch in epochs),
            "own_steps_cpu_seconds": statistics.median(epoch.steps.cpu for epoch in epochs),
            "data_wait": statistics.median(epoch.data_wait for epoch in epochs),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of videos, instead of generated clips")
    parser.add_argument("--weights", type=Path, help="folder of a pretrained ViT, instead of random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, help="how many are generated (24), or taken of the folder (all)")
    parser.add_argument("--workers", type=int, help="as --num-workers")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.data is None:
            videos = make_clips(folder / "clips", options.clips or 24)
        else:
            whole = read_layout(options.data, group_pattern="$^", val_groups="none", test_groups="none")
            videos = list(whole.subset("train"))
            videos = videos[:: -(-len(videos) // (options.clips or len(videos)))]
        found = measure(videos, options.weights, folder, options)
    results = summary(found)
    alone = found["memory"]
    print(
        f"{len(videos)} clips; the steps alone: {statistics.median(e.steps.wall for e in alone):.2f} s, "
        f"{statistics.median(e.steps.cpu for e in alone):.2f} s of the processor"
    )
    for kind, row in results.items():
        print(
            f"epoch from {kind:7} {row['wall_seconds']:6.2f} s  x {row['wall_ratio']:.3f}   processor "
            f"{row['cpu_seconds']:6.2f} s  x {row['cpu_ratio']:.3f}   waits for data {row['data_wait']:.1%}"
        )
    facts = {"tvit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"data": "generated" if options.data is None else options.data.name}
    facts |= {"weights": "random" if options.weights is None else options.weights.name}
    print(
        json.dumps(
            {
                "benchmark": "epoch", **facts, "threads": options.threads, "clips": len(videos),
                "results": results,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
