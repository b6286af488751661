"""A check of tvit on one GPU: parity, training under faults, speed. Sections are caught, timed and written at once.

    python tests/bench gpu-check -- [--only SECTION,…] [--out FILE] [--budget 540] [--device cuda] [--tiny]

Each line of FILE is JSON: a figure, or a check with `ok`. A section that raises does not end the others, and none
begins after `--budget` seconds. Two calls of ten minutes: `--only facts,parity,pixels,waits,train,barrier`, then
`--only speed,peers,fed,trace`. `--device cpu --tiny` shows in a minute that it runs where there is no GPU. Sections:

facts    device, versions, the attention kernels that PyTorch chooses
parity   logits and gradients of each scheme and format against float64 on the CPU, and against PEFT's layers
pixels   transforms of training and evaluation on the device against those of the CPU
waits    a step and its augmentation never wait for the device
train    `tvit train` on a frame store: formats, --compile, --gradient-checkpointing, an overflow in fp16,
         --per-gpu-batch-size auto, memory that runs out, SIGTERM and resume, bit for bit with --deterministic
barrier  two CPU processes on a machine with one GPU
speed    clips per second, time of the host beside that of a step, share of the matmul rate, memory
peers    the same step by transformers' video models with PEFT
fed      an epoch of `tvit train` from a frame store, beside the steps alone, and its wait for data
trace    kernels that take most of a step, and the share of the time without a kernel
"""

import argparse
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import peers
import torch
from data import make_clips
from epoch import make_weights, write_manifest
from safetensors.torch import load_file
from step import TARGETS
from torch import Tensor, nn
from torch.nn import functional as F

from tvit_cli import __version__
from tvit_cli.data.augment import Augmentation, eval_transform, train_transform
from tvit_cli.engine.extract import extract
from tvit_cli.engine.train import loop, train
from tvit_cli.engine.train.dryrun import count_flops
from tvit_cli.engine.train.optim import adamw, parameter_groups
from tvit_cli.model import lora
from tvit_cli.portable.config import ATTENTIONS
from tvit_cli.portable.layers import recompute_block
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.results import EpochDone, Note, TrainResult, silent
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.train import TrainSettings

ROOT = Path(__file__).parents[2]
CLASSES = 101
LIMITS = {"no": 2e-4, "bf16": 6e-2, "fp16": 1.2e-2}  # relative error of logits and gradients
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = {"depth": 12, "width": 768, "frame_size": 224}  # ViT-B
SMALL = {"depth": 4, "width": 384, "frame_size": 112, "n_frames": 4}
TINY = {"depth": 2, "width": 64, "frame_size": 32, "n_frames": 2}
AUGMENTED = Augmentation(randaugment=2, random_erasing=0.5)


class Check:
    """The options, the lines written so far, and the tools that sections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begun, self.bad = options, time.monotonic(), list[str]()
        self.device = torch.device(options.device)
        self.is_cuda = self.device.type == "cuda"
        self.formats = [name for name in DTYPES if self.is_cuda or name != "fp16"]

    def write(self, section: str, **facts: Any) -> None:
        line = {"section": section, "at": round(time.monotonic() - self.begun, 1), **facts}
        if self.options.out is not None:
            with self.options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        print(", ".join(shown), flush=True)

    def expect(self, section: str, check: str, ok: bool, **facts: Any) -> None:
        if not ok:
            self.bad.append(f"{section}: {check}")
        self.write(section, check=check, ok=bool(ok), **facts)

    def model(
        self, *, own: bool = True, lively: bool = False, full: bool = False, **shape: Any
    ) -> TemporalViT:
        """A ViT with adapters, whose B is not 0 if `lively`; without adapters if `full`."""
        checkpointing, dropout = shape.pop("checkpointing", False), shape.pop("dropout", 0.0)
        shape = {"n_frames": 8, **SHAPE, **shape, **(TINY if self.options.tiny else {})}
        config = ViTConfig(num_classes=CLASSES, num_heads=shape["width"] // 64, **shape)
        model = build_model(config, seed=0, from_scratch=True)
        if not full:
            with nullcontext() if own else mock.patch.object(lora, "own_layer", lambda: None):
                lora.attach(model, lora.LoraSpec(8, 8, dropout, False, "none", TARGETS, ()), seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, weight in model.named_parameters():
            if lively and "lora_B" in name:
                nn.init.normal_(weight, std=0.05, generator=generator)
        if checkpointing:
            model.run_block = recompute_block
        return model.train()

    def clips(self, model: TemporalViT, count: int) -> tuple[Tensor, Tensor]:
        config, generator = model.config, torch.Generator().manual_seed(2)
        size = (count, config.n_frames, 3, config.frame_size, config.frame_size)
        return torch.randn(size, generator=generator), torch.arange(count) % CLASSES

    def autocast(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext() if name == "no" else torch.autocast(self.device.type, DTYPES[name])

    def synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def step(self, model: nn.Module, clips: Tensor, labels: Tensor) -> Callable[[], None]:
        """A training step in bf16, with clipped gradients."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = adamw(
            parameter_groups(model, weight_decay=0.05, bias_weight_decay=False, norm_weight_decay=False)
            if isinstance(model, TemporalViT)
            else [{"params": trained}],
            learning_rate=1e-4, betas=(0.9, 0.999), epsilon=1e-8,
        )  # fmt: skip
        clips, labels = clips.to(self.device), labels.to(self.device)

        def step() -> None:
            with self.autocast("bf16"):
                logits: Any = model(clips)
            logits = getattr(logits, "logits", logits)
            F.cross_entropy(logits.float(), labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def seconds(self, work: Callable[[], object], rounds: int = 10) -> tuple[float, float]:
        """Seconds of a call while the queue is full, and of the host alone."""
        for _ in range(3):
            work()
        self.synchronise()
        begun, host = time.perf_counter(), 0.0
        for _ in range(2 if self.options.tiny else rounds):
            started = time.perf_counter()
            work()
            host += time.perf_counter() - started
        self.synchronise()
        rounds = 2 if self.options.tiny else rounds
        return (time.perf_counter() - begun) / rounds, host / rounds

    def matmul_rate(self) -> float:
        rows = 256 if self.options.tiny else 8192
        a = torch.randn(rows, rows, device=self.device, dtype=torch.bfloat16)
        return 2 * rows**3 / self.seconds(lambda: torch.mm(a, a), 20)[0]

    @contextmanager
    def store(self, clips: int) -> Iterator[Callable[..., TrainResult]]:
        """A function that trains on a frame store of this many clips: settings, and the events, as keywords."""
        tiny = self.options.tiny
        shape = {"n_frames": 8, **SHAPE, **(TINY if tiny else {})}
        config = ViTConfig(num_classes=2, num_heads=shape["width"] // 64, **shape)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            few, videos = make_clips(folder, 2 if tiny else 8), []
            for number in range(8 if tiny else clips):
                first = few[number % len(few)]
                path = first.path.with_name(f"v_{first.label}_g{number:05d}_c01.avi")
                if not path.exists():
                    os.link(first.path, path)
                videos.append(replace(first, path=path))
            manifest = write_manifest(folder / "store", videos)
            extract(
                ExtractSettings(path_to_data=str(manifest), val_groups="none", test_groups="none"), silent
            )
            common: dict[str, Any] = {
                "path_to_data": str(manifest), "working_directory": str(folder / "runs"), "val_groups": "none",
                "test_groups": "none", "test_at_end": False, "n_frames": config.n_frames,
                "hf_model_name": str(make_weights(folder / "weights", config)), "img_size": config.frame_size,
                "attention": "joint", "lora_rank": 8, "lora_target_modules": list(TARGETS), "epochs": 2, "warmup_epochs": 0,
                "per_gpu_batch_size": 2 if tiny else 16, "device": self.options.device, "mixed_precision": "bf16",
            }  # fmt: skip

            def run(*, report: Callable[[Any], None] = silent, command: bool = False, **changes: Any) -> Any:
                settings = TrainSettings.model_validate({**common, **changes})
                if not command:
                    return train(settings, report)
                path = folder / f"{settings.experiment_name}.json"
                path.write_text(settings.model_dump_json(exclude_unset=True))
                return [sys.executable, "-m", "tvit_cli", "train", "--config", str(path)]

            yield run


def facts(check: Check) -> None:
    found: dict[str, Any] = {
        "tvit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    found |= {"cpus": os.cpu_count(), "device": check.options.device}
    if check.is_cuda:
        q = torch.randn(8, 12, 197, 64, device=check.device, dtype=torch.bfloat16)
        kernels = ("math", "flash", "efficient", "cudnn")
        for name, queries, keys in (
            ("bf16", q, q),
            ("one query", q[:, :, :1], q),
            ("fp32", q.float(), q.float()),
        ):
            found[f"attention, {name}"] = kernels[torch._fused_sdp_choice(queries, keys, keys)]
        found |= {
            "gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "free_gb": torch.cuda.mem_get_info()[0] / 1e9,
        }  # fmt: skip
    check.write("facts", **found)


def parity(check: Check) -> None:
    """The adapters' error may be twice that of PEFT's layers in the same format."""
    for attention in ATTENTIONS:

        def run(
            own: bool, name: str, dtype: torch.dtype | None = None, attention: str = attention, **how: Any
        ) -> Any:
            device = check.device if dtype is None else torch.device("cpu")
            model = check.model(own=own, lively=True, attention=attention, **SMALL, **how).to(device, dtype)
            clips, labels = check.clips(model, 4)
            with check.autocast(name):
                logits = model(clips.to(device, dtype))
            F.cross_entropy(logits.to(dtype or torch.float32), labels.to(device)).backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            return logits.detach().double().cpu(), torch.cat(gradients).double().cpu()

        right = run(True, "no", torch.float64)
        for name in check.formats:
            own, theirs = run(True, name), run(False, name)
            errors = {
                "logits": error(own[0], right[0]), "gradients": error(own[1], right[1]),
                "peft": error(theirs[1], right[1]),
            }  # fmt: skip
            close = max(errors["logits"], errors["gradients"]) < LIMITS[name]
            close = close and errors["gradients"] < 2 * errors["peft"] + 1e-6
            check.expect("parity", f"{attention} {name}", close, **errors)
        again = error(run(True, "bf16", checkpointing=True)[1], run(True, "bf16")[1])
        check.expect("parity", f"{attention} gradient checkpointing", again < 1e-2, gradients=again)


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp_min(1e-30))


def pixels(check: Check) -> None:
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randint(256, (4, 3, 120, 160), dtype=torch.uint8, generator=generator) for _ in range(4)]
    keys, shape, cpu = torch.arange(4), Preprocessing(n_frames=4, frame_size=112), torch.device("cpu")
    for name, augmentation in (("plain", Augmentation()), ("augmented", AUGMENTED)):
        both = [
            train_transform(
                clips, keys, keys, augmentation=augmentation, preprocessing=shape, seed=0, device=device
            ).cpu()
            for device in (cpu, check.device)
        ]
        gap = (both[0] - both[1]).abs()
        check.expect(
            "pixels", name, float(gap.mean()) < 0.02, mean=float(gap.mean()), largest=float(gap.max())
        )
    both = [eval_transform(clips, preprocessing=shape, device=device).cpu() for device in (cpu, check.device)]
    largest = float((both[0] - both[1]).abs().max())
    check.expect("pixels", "evaluation", largest < 0.05, largest=largest)


def waits(check: Check) -> None:
    model = check.model(dropout=0.1).to(check.device)
    config, step = model.config, check.step(model, *check.clips(model, 2))
    shape = Preprocessing(n_frames=config.n_frames, frame_size=config.frame_size)
    clips = [torch.zeros(config.n_frames, 3, 240, 320, dtype=torch.uint8) for _ in range(2)]
    clips = [clip.pin_memory() if check.is_cuda else clip for clip in clips]
    keys, problem = torch.arange(2), ""
    step()
    step()
    check.synchronise()
    if check.is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        train_transform(
            clips, keys, keys, augmentation=AUGMENTED, preprocessing=shape, seed=0, device=check.device
        )
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    finally:
        if check.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    check.expect("waits", "step and augmentation", not problem, problem=problem)


def training(check: Check) -> None:
    def losses(result: TrainResult) -> list[float]:
        return [record["train_loss"] for record in result.steps]

    def weights(run: Path) -> dict[str, Tensor]:
        return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "trainable.safetensors")

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    with check.store(256) as run:
        plain = losses(run(experiment_name="plain"))
        check.expect("train", "bf16", plain[-1] < plain[0], first=plain[0], last=plain[-1])
        for name in ("compile", "gradient_checkpointing"):
            found = losses(run(experiment_name=name, **{name: True}))
            gap = max(abs(a - b) for a, b in zip(plain, found, strict=True))
            check.expect("train", f"--{name.replace('_', '-')}", gap < 2e-2, largest_difference=gap)
        if check.is_cuda:
            real, calls = loop.loss_share, list[int]()

            def overflowing(*arguments: Any, **keywords: Any) -> Tensor:
                calls.append(1)
                return real(*arguments, **keywords) * (1e30 if len(calls) == 2 else 1)

            with mock.patch.object(loop, "loss_share", overflowing):
                result = run(experiment_name="fp16", mixed_precision="fp16")
            good = all(tensor.isfinite().all() for tensor in weights(result.run).values())
            check.expect("train", "fp16, one overflow", good, last=losses(result)[-1])
            free, total = torch.cuda.mem_get_info()
            for name, most, changes in (
                ("auto", 6e9, {"per_gpu_batch_size": "auto", "global_batch_size": 64}),
                ("halving", 3e9, {"per_gpu_batch_size": 64}),
            ):
                texts: list[str] = []
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.set_per_process_memory_fraction(min(1.0, (total - free + most) / total))
                try:
                    run(
                        experiment_name=name, epochs=1, **changes,
                        report=lambda event, texts=texts: texts.append(event.text) if isinstance(event, Note) else None,
                    )  # fmt: skip
                finally:
                    torch.cuda.set_per_process_memory_fraction(1.0)
                halved = [text for text in texts if "out of memory" in text]
                check.expect("train", name, bool(halved) == (name == "halving"), notes=halved,
                             peak_gb=torch.cuda.max_memory_allocated() / 1e9)  # fmt: skip
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        whole = run(experiment_name="whole", deterministic=True, save_every_steps=1)
        command = run(experiment_name="cut", deterministic=True, save_every_steps=1, command=True)
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as child:
            while child.poll() is None and not list((whole.run.parent / "cut").glob("checkpoints/step-*")):
                time.sleep(0.01)
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=120)
        check.expect("train", "SIGTERM", child.returncode == 143, code=child.returncode)
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
        is_same = not done.returncode and same(weights(whole.run), weights(whole.run.parent / "cut"))
        check.expect(
            "train",
            "resumed bit for bit with --deterministic",
            is_same,
            error=done.stderr[-300:] * (not is_same),
        )


def barrier(check: Check) -> None:
    with check.store(16) as run:
        command = run(experiment_name="two", device="cpu", num_processes=2, epochs=1, mixed_precision="no",
                      per_gpu_batch_size=2, command=True)  # fmt: skip
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    check.expect(
        "barrier", "two CPU processes", not done.returncode, error=done.stderr[-300:] * bool(done.returncode)
    )


def speed(check: Check) -> None:
    rate = check.matmul_rate()
    check.write("speed", matmul_tflops=rate / 1e12)
    cases: list[tuple[str, int, dict[str, Any]]] = [(attention, 8, {}) for attention in ATTENTIONS]
    cases += [
        ("joint", 16, {}),
        *(("joint", 8, how) for how in ({"dropout": 0.0}, {"own": False}, {"full": True})),
    ]
    for attention, frames, how in [*cases, ("joint", 8, {"checkpointing": True})]:
        for batch in (2,) if check.options.tiny else (8, 32, 96):
            case = f"{attention}, {frames} frames, {how or 'LoRA'}, batch {batch}"
            gc.collect()
            if check.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                model = check.model(attention=attention, n_frames=frames, **{"dropout": 0.1, **how}).to(
                    check.device
                )
                took, host = check.seconds(check.step(model, *check.clips(model, batch)))
            except torch.OutOfMemoryError:
                check.write("speed", case=case, out_of_memory=True)
                continue
            passes = 3 if how.get("full") else 2  # frozen weights have no gradient
            check.write(
                "speed", case=case, clips_per_second=batch / took, step_ms=1e3 * took, host_ms=1e3 * host,
                of_matmul_rate=count_flops(model.config) * batch * passes / took / rate,
                gigabytes=torch.cuda.max_memory_allocated() / 2**30 if check.is_cuda else 0.0,
            )  # fmt: skip


def beside_peers(check: Check) -> None:
    depth, batch = (1, 1) if check.options.tiny else (12, 8)
    warnings.simplefilter("ignore")  # transformers warns of optional packages
    for name in ("VideoMAE", "ViViT", "TimeSformer"):
        clips = torch.randn(batch, peers.PEERS[name]["n_frames"], 3, 224, 224)
        rates = {}
        for kind, make in (("tvit", peers.ours), ("peer", peers.peer)):
            model = make(name, depth, 0.1).to(check.device)
            rates[kind] = batch / check.seconds(check.step(model, clips, torch.arange(batch)))[0]
            del model
        check.write(
            "peers", case=name, times_faster=rates["tvit"] / rates["peer"], clips_per_second=rates["tvit"]
        )


def fed(check: Check) -> None:
    epochs: list[EpochDone] = []
    with check.store(4096) as run:
        run(
            experiment_name="fed", epochs=3, per_gpu_batch_size=2 if check.options.tiny else 32,
            report=lambda event: epochs.append(event) if isinstance(event, EpochDone) else None,
        )  # fmt: skip
    last = epochs[-1].metrics
    names = ("clips_per_second", "data_wait", "host_bound")
    check.write("fed", **{name: last[name] for name in names if name in last})


def trace(check: Check) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = check.model(dropout=0.1).to(check.device)
    step = check.step(model, *check.clips(model, 2 if check.options.tiny else 32))
    check.seconds(step, 2)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.is_cuda else [])]
    begun = time.perf_counter()
    with profile(activities=kinds) as profiler:
        for _ in range(3):
            step()
        check.synchronise()
    wall = time.perf_counter() - begun
    key = "self_device_time_total" if check.is_cuda else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows) / 1e6
    check.write("trace", seconds=wall, in_kernels=total / wall)
    for row in rows[:12]:
        check.write("trace", kernel=row.key[:80], share=getattr(row, key) / 1e6 / total, calls=row.count)


SECTIONS: dict[str, Callable[[Check], None]] = {
    "facts": facts, "parity": parity, "pixels": pixels, "waits": waits, "train": training, "barrier": barrier,
    "speed": speed, "peers": beside_peers, "fed": fed, "trace": trace,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    check = Check(parser.parse_args())
    chosen = check.options.only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    for name in chosen:
        if time.monotonic() - check.begun > check.options.budget:
            check.expect(name, "begun within the budget", False)
            continue
        try:
            SECTIONS[name](check)
        except Exception:  # noqa: BLE001  (the other sections are run)
            check.expect(name, "ended", False, raised=traceback.format_exc(limit=-3))
    print(json.dumps({"benchmark": "gpu", "device": check.options.device, "bad": check.bad}))
    return bool(check.bad)


if __name__ == "__main__":
    sys.exit(main())
