"""`tvit train --dry-run`: sizes, FLOPs, memory and time of a training, measured without writing a file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tvit_cli.engine.dataset import MOTIONS, find_data, make_demo_data
from tvit_cli.engine.distributed import any_rank, local_processes
from tvit_cli.engine.launch import ImmediateStop, lost_rank_errors
from tvit_cli.engine.train import set_up
from tvit_cli.engine.train.build import clips_to_standardise, compile_errors
from tvit_cli.engine.train.loop import forward_backward, remaining_passes, update
from tvit_cli.engine.train.memory import Probe, free_bytes, out_of_memory_errors
from tvit_cli.engine.train.state import Loop, score_videos
from tvit_cli.model.lora import trainable_report
from tvit_cli.portable.config import ViTConfig
from tvit_cli.results import DryRun, Note, Progress, Report, silent
from tvit_cli.settings.train import TrainSettings


def count_flops(config: ViTConfig, n_frames: int | None = None) -> int:
    """Operations of one clip's forward pass, two per multiply-add, matrix products alone."""
    n_times = (n_frames or config.n_frames) // config.tubelet_size
    n_patches = config.patches_per_frame
    first = 1 + config.extra_tokens
    groups, tokens = (
        (1, first + n_times * n_patches) if config.attention == "joint" else (n_times, first + n_patches)
    )
    asking = 1 if config.pool == "class" else tokens  # in the last block
    total = (
        n_times * n_patches * config.tubelet_size * config.num_channels * config.patch_size**2 * config.width
    )
    total += (config.depth - 1) * _block(config, groups, tokens, tokens) + _block(
        config, groups, tokens, asking
    )
    if config.attention == "divided":  # before its attention within frames, a block attends over time
        total += config.depth * _attention_flops(config, tokens, n_times, n_times)
    if config.pool == "attentive":
        total += groups * tokens * config.width * (config.num_heads + 1)
    total += (config.temporal_depth or 0) * _block(config, 1, n_times, n_times)
    return 2 * (total + config.width * config.num_classes)


def _block(config: ViTConfig, groups: int, tokens: int, asking: int) -> int:
    """Multiply-adds of a plain block on `groups` groups of `tokens`, of which `asking` ask."""
    width = config.width
    attention = _attention_flops(config, groups, tokens, asking)
    layers = 3 if config.activation == "swiglu" else 2
    return attention + layers * groups * asking * width * config.hidden_width


def _attention_flops(config: ViTConfig, groups: int, tokens: int, asking: int) -> int:
    layers = 2 * groups * (tokens + asking) * config.width**2
    return layers + 2 * groups * asking * tokens * config.width


STEPS = 5  # measured at most, after one that is not: it starts workers, compiles, and allocates
SECONDS = 60.0  # after which no further step is begun
VALIDATION_CLIPS = 32  # scored at most, to tell how long an epoch's validation takes


def dry_run(settings: TrainSettings, report: Report = silent) -> DryRun:
    """Build all that a training needs, take some steps on its clips in memory, and tell what was found.

    Nothing is written but what outlives any command: weights that were fetched stay in the Hugging Face cache.
    Raises what `train` raises before its first step, and RunError where memory runs out.
    """
    with lost_rank_errors(), ImmediateStop("Nothing was written."), _data(settings, report) as changed:
        loop = set_up(changed, report, standardises=False)
        if settings.feature_norm and loop.run.resume_from is None:
            clips = len(clips_to_standardise(loop.source))
            loop.report(Note(f"A training reads {clips} of its clips first, to standardise features."))
        with out_of_memory_errors(loop.settings, loop.device), compile_errors(loop.settings.compile):
            return _measure(loop)


@contextmanager
def _data(settings: TrainSettings, report: Report) -> Iterator[TrainSettings]:
    """The settings with data that is there: a demo set that would have to be made lies in a temporary folder."""
    root = find_data(settings.path_to_data)
    if root.name != MOTIONS or root.exists():
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="tvit-") as folder:
        report(Note(f"{root} is not there: the demo data set is made in a temporary folder."))
        made = Path(folder) / MOTIONS
        make_demo_data(made, report)
        yield settings.model_copy(update={"path_to_data": str(made)})


def _measure(loop: Loop) -> DryRun:
    settings, plan, config = loop.settings, loop.plan, loop.built.config
    trainable, total = trainable_report(loop.plain_model)
    free = free_bytes(loop.device, local_processes())
    probe = Probe(loop.built, loop.plain_model, loop.accelerator, averages=loop.ema is not None)
    memory = probe.memory_model()
    flops = _flops(lambda: probe.run(loop.plain_model, 1))
    loop.optimizer.zero_grad()
    seconds, wait = _time_steps(loop)
    layout = loop.source.layout
    counts = ", ".join(f"{len(loop.source.readable(s))} {s}" for s in ("train", "val", "test"))
    return DryRun(
        folder=loop.run.folder,
        model=f"{settings.hf_model_name or 'from scratch'}: {config.depth} blocks, {config.width} wide, "
        f"{config.attention} attention",
        data=f"{loop.source.root}: {len(layout.labels)} classes, {counts} videos",
        device=str(loop.device),
        precision=settings.mixed_precision,
        parameters=total,
        trainable=trainable,
        forward_flops=count_flops(config),
        pass_flops=flops,
        batch=str(plan),
        clips_per_step=plan.global_batch,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=plan.epochs,
        memory=memory,
        micro_batch=plan.batch_size,
        available=free + memory.weights + memory.average,
        seconds_per_step=seconds,
        data_wait=wait,
        validation_seconds=_time_validation(loop),
    )


def _flops(work: Callable[[], None]) -> int:
    """Operations of what `work` does, counted while it runs, backward passes and recomputed blocks included."""
    with FlopCounterMode(display=False, custom_mapping=_FUSED_CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


def _attention(query: torch.Size, key: torch.Size, *others: Any, **options: Any) -> int:
    """Operations of softmax(query key) value: queries (…, Q, D/A), keys (…, N, D/A)."""
    return 4 * math.prod(query) * key[-2]


def _attention_backward(
    gradient: Any, query: torch.Size, key: torch.Size, *others: Any, **options: Any
) -> int:
    """Five products of that size, where forward has two: the weights once more, then four gradients."""
    return 10 * math.prod(query) * key[-2]


# torch's counter does not know the attention that it runs on a CPU.
_FUSED_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _time_steps(loop: Loop) -> tuple[float, float]:
    """Seconds of a step, and the share of it that the model waits for data; the first step does not count."""
    loop.step = 0  # a run that is gone on with may have few steps left
    loop.model.train()
    seconds: list[float] = []
    waits: list[float] = []
    work = remaining_passes(loop)
    begun = started = time.perf_counter()
    waited, over = 0.0, False
    while not over:
        asked = time.perf_counter()
        planned, batch = next(work)
        waited += time.perf_counter() - asked
        forward_backward(loop, planned, batch)
        if planned.closes_window:
            update(loop)
            loop.step += 1
            _wait_for(loop.device)
            now = time.perf_counter()
            seconds.append(now - begun)
            waits.append(waited)
            begun, waited = now, 0.0
            loop.report(Progress("measuring steps", len(seconds), STEPS + 1))
            late = any_rank(now - started > SECONDS, loop.accelerator)
            over = late or len(seconds) > STEPS or loop.step == loop.plan.total_steps
    work.close()
    if len(seconds) > 1:
        del seconds[0], waits[0]
    return sum(seconds) / len(seconds), sum(waits) / sum(seconds)


def _time_validation(loop: Loop) -> float:
    """Seconds that this process takes for its share of the val videos, by those of a few of them."""
    videos = loop.source.readable("val")
    share = -(-len(videos) // loop.plan.processes)
    some = videos[: min(share, VALIDATION_CLIPS)]
    if not some:
        return 0.0
    begun = time.perf_counter()
    score_videos(loop, some)
    return (time.perf_counter() - begun) * share / len(some)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
