"""Training steps on an accelerator: clips per second, share of the matmul rate, memory, per scheme and frame count.

    python tests/bench/gpu.py [--device cuda] [--precision bf16] [--frames 8,16,32] [--batch 8] [--compile]

ViT-B with rank 8 on q, k, v, fc1 and fc2, clips of 224 pixels that are on the device already; forward, backward and
the optimizer's update, gradients clipped. The matmul rate is measured in the same precision on a product of an
MLP's shape, so that "of the matmul rate" is what is left to gain by anything but another kernel. Operations are
those that the step needs; recomputation (--checkpointing) is not counted. Beside the schemes stands what it takes to
bring uint8 clips of 320x240 from pinned memory to the device and augment them there, and last the product's own training
from a frame store, its third epoch: clips per second, beside those of the steps alone, and the share of the time that
the device waited for data. `--device cpu --width 64 --depth 2 --size 64 --clips 16` shows that it runs where there is no
accelerator.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from data import make_clips
from epoch import make_weights, write_manifest
from step import TARGETS, count_flops
from torch.nn import functional as F

from tvit_cli import __version__
from tvit_cli.data.augment import Augmentation, train_transform
from tvit_cli.engine.extract import extract
from tvit_cli.engine.train import train
from tvit_cli.engine.train.optim import adamw, parameter_groups
from tvit_cli.model import lora
from tvit_cli.portable.config import ATTENTIONS
from tvit_cli.portable.layers import recompute_block
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.results import EpochDone, Event, silent
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.train import TrainSettings

CLASSES = 101


def make(options: argparse.Namespace, attention: str, frames: int) -> TemporalViT:
    config = ViTConfig(
        num_classes=CLASSES, n_frames=frames, frame_size=options.size, width=options.width, depth=options.depth,
        num_heads=options.width // 64, attention=attention,
    )  # fmt: skip
    model = build_model(config, seed=0, from_scratch=True)
    lora.attach(model, lora.LoraSpec(8, 8, options.dropout, False, "none", TARGETS, ()), seed=0)
    if options.checkpointing:
        model.run_block = recompute_block
    return model.train().to(options.device)


def autocast(options: argparse.Namespace) -> AbstractContextManager[Any]:
    if options.precision == "no":
        return nullcontext()
    return torch.autocast(torch.device(options.device).type, torch.bfloat16)


def training_step(
    options: argparse.Namespace, model: TemporalViT, frames: int, batch: int
) -> Callable[[], None]:
    groups = parameter_groups(model, weight_decay=0.05, bias_weight_decay=False, norm_weight_decay=False)
    optimizer = adamw(groups, learning_rate=1e-4, betas=(0.9, 0.999), epsilon=1e-8)
    if options.compile:
        torch.compiler.reset()  # else the ninth shape in one process would be run uncompiled
    called: Any = torch.compile(model, dynamic=False) if options.compile else model
    clips = torch.randn(batch, frames, 3, options.size, options.size, device=options.device)
    labels = torch.zeros(batch, dtype=torch.int64, device=options.device)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with autocast(options):
            loss = F.cross_entropy(called(clips), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def augmentation(options: argparse.Namespace, frames: int, batch: int) -> Callable[[], object]:
    clips = [torch.randint(256, (frames, 240, 320, 3), dtype=torch.uint8) for _ in range(batch)]
    if torch.cuda.is_available():
        clips = [clip.pin_memory() for clip in clips]
    views = [clip.permute(0, 3, 1, 2) for clip in clips]
    keys = torch.arange(batch)
    preprocessing = Preprocessing(n_frames=frames, frame_size=options.size)
    return lambda: train_transform(
        views, keys, keys, augmentation=Augmentation(), preprocessing=preprocessing, seed=0,
        device=torch.device(options.device),
    )  # fmt: skip


def fed_from_store(options: argparse.Namespace, attention: str, frames: int) -> dict[str, float]:
    """Clips per second and the share of the time spent waiting, of the third epoch of `tvit train` on a store."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = make_clips(folder, min(8, options.clips))
        videos = []
        for number in range(options.clips):
            first = few[number % len(few)]
            path = first.path.with_name(f"v_{first.label}_g{number:05d}_c01.avi")
            if not path.exists():
                os.link(first.path, path)
            videos.append(replace(first, path=path))
        manifest = write_manifest(folder / "store", videos)
        extract(ExtractSettings(path_to_data=str(manifest), val_groups="none", test_groups="none"), silent)
        config = ViTConfig(
            num_classes=2, n_frames=frames, frame_size=options.size, width=options.width, depth=options.depth,
            num_heads=options.width // 64, attention=attention,
        )  # fmt: skip
        settings = TrainSettings(
            path_to_data=str(manifest), working_directory=folder / "runs", val_groups="none", test_groups="none",
            test_at_end=False, hf_model_name=str(make_weights(folder / "weights", config)), n_frames=frames,
            img_size=options.size, attention=attention, lora_rank=8, lora_dropout=options.dropout,
            lora_target_modules=TARGETS, epochs=3, warmup_epochs=0, per_gpu_batch_size=options.batch, device=options.device, compile=options.compile,
            mixed_precision=options.precision, gradient_checkpointing=options.checkpointing,
        )  # fmt: skip
        found: dict[str, float] = {}

        def watch(event: Event) -> None:
            if isinstance(event, EpochDone):
                found.update({key: event.metrics[key] for key in ("clips_per_second", "data_wait")})

        train(settings, watch)
    return found


def seconds(options: argparse.Namespace, work: Callable[[], object], rounds: int) -> float:
    """Median of one call, after three that warm up (and compile)."""
    times = []
    for number in range(rounds + 3):
        synchronise(options)
        start = time.perf_counter()
        work()
        synchronise(options)
        if number >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronise(options: argparse.Namespace) -> None:
    if torch.device(options.device).type != "cpu":
        torch.accelerator.synchronize()


def matmul_rate(options: argparse.Namespace) -> float:
    """Operations per second of large products, many in a row, in the precision that is measured."""
    dtype = torch.float32 if options.precision == "no" else torch.bfloat16
    rows = 1024 if torch.device(options.device).type == "cpu" else 16384
    a = torch.randn(rows, options.width, device=options.device, dtype=dtype)
    b = torch.randn(options.width, 4 * options.width, device=options.device, dtype=dtype)
    # one alone is over before the next is asked for
    many = 1 if torch.device(options.device).type == "cpu" else 20
    out = a @ b
    product = 2 * rows * options.width * 4 * options.width

    def products() -> None:
        for _ in range(many):
            torch.mm(a, b, out=out)

    return many * product / seconds(options, products, 20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--schemes", default=",".join(ATTENTIONS))
    parser.add_argument("--frames", default="8,16,32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clips", type=int, default=256, help="in the frame store")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    rate = matmul_rate(options)
    is_cuda = torch.device(options.device).type == "cuda"
    name = torch.cuda.get_device_name(options.device) if is_cuda else platform.processor() or options.device
    print(f"{name}: {rate / 1e12:.2f} TFLOP/s in a product, {options.precision}")
    results = {}
    for attention in options.schemes.split(","):
        for frames in map(int, options.frames.split(",")):
            # Counted on the CPU for one clip: kernels of an accelerator are not all known to the counter.
            counted = make(
                argparse.Namespace(**{**vars(options), "device": "cpu", "checkpointing": False}),
                attention,
                frames,
            )
            clips = torch.randn(1, frames, 3, options.size, options.size)
            label = torch.zeros(1, dtype=torch.int64)
            flops = count_flops(lambda m=counted, c=clips, y=label: F.cross_entropy(m(c), y).backward())
            del counted
            gc.collect()
            if is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                took = seconds(
                    options,
                    training_step(options, make(options, attention, frames), frames, options.batch),
                    options.rounds,
                )
            except torch.OutOfMemoryError:
                print(f"{attention:10} {frames:3} frames: out of memory; take a smaller --batch", flush=True)
                continue
            clips_per_second = options.batch / took
            results[f"{attention}, {frames} frames"] = found = {
                "clips_per_second": clips_per_second,
                "of_matmul_rate": flops * clips_per_second / rate,
                "gigaflops_per_clip": flops / 1e9,
                "gigabytes": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0,
            }
            print(
                f"{attention:10} {frames:3} frames", *(f"{k} {v:.3g}" for k, v in found.items()), flush=True
            )
    for frames in map(int, options.frames.split(",")):
        took = seconds(options, augmentation(options, frames, options.batch), options.rounds)
        results[f"augmentation, {frames} frames"] = {"clips_per_second": options.batch / took}
        print(f"augmentation {frames:3} frames: {options.batch / took:.0f} clips per second", flush=True)
    attention, frames = options.schemes.split(",")[0], int(options.frames.split(",")[0])
    results[f"{attention}, {frames} frames, from a frame store"] = found = fed_from_store(
        options, attention, frames
    )
    print(
        f"{attention:10} {frames:3} frames from a frame store: {found['clips_per_second']:.3g} clips per second, "
        f"waits for data {found['data_wait']:.1%} of the time",
        flush=True,
    )
    facts = {key: value for key, value in vars(options).items() if key not in ("schemes", "frames")}
    machine = {
        "tvit": __version__, "torch": torch.__version__, "python": platform.python_version(), "machine": name,
    }  # fmt: skip
    print(
        json.dumps({"benchmark": "gpu", **machine, **facts, "matmul_tflops": rate / 1e12, "results": results})
    )


if __name__ == "__main__":
    main()
