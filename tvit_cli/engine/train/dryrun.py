"""`tvit train --dry-run`: sizes, FLOPs, memory and time of a training, measured without writing a file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tvit_cli.engine.dataset import MOTIONS, find_data, make_demo_data
from tvit_cli.engine.distributed import any_rank, local_processes
from tvit_cli.engine.launch import ImmediateStop, deterministic_algorithms, lost_rank_errors
from tvit_cli.engine.train import plan_facts, set_up
from tvit_cli.engine.train.build import clips_to_standardise, compile_errors
from tvit_cli.engine.train.loop import forward_backward, remaining_batches, update
from tvit_cli.engine.train.memory import Probe, free_bytes, out_of_memory_errors
from tvit_cli.engine.train.monitor import Clock
from tvit_cli.engine.train.state import Loop
from tvit_cli.errors import plural
from tvit_cli.model.lora import trainable_report
from tvit_cli.portable.config import ViTConfig
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.results import DryRun, Note, Progress, Report, silent
from tvit_cli.settings.train import TrainSettings

STEPS = 5  # measured at most, after a first one that starts workers, compiles, and allocates


def dry_run(settings: TrainSettings, report: Report = silent) -> DryRun:
    """Sets up a training, takes some steps in memory, and returns its plan and cost.

    Nothing is written, except downloaded weights in the Hugging Face cache. Raises the errors of `train` before its
    first step, and RunError if memory runs out.
    """
    with (
        lost_rank_errors(),
        deterministic_algorithms(settings.deterministic, settings.device),
        ImmediateStop("Nothing was written.", report),
        _data(settings, report) as changed,
    ):
        loop = set_up(changed, report, standardises=False)
        if settings.feature_norm and settings.from_ is None and loop.run.resume_from is None:
            clips = len(clips_to_standardise(loop.source.readable("train")))
            loop.report(Note(f"A training reads {clips} of its clips first, to standardise features."))
        with out_of_memory_errors(loop.settings, loop.device), compile_errors(loop.settings.compile):
            return _measure(loop)


@contextmanager
def _data(settings: TrainSettings, report: Report) -> Iterator[TrainSettings]:
    """The settings; a missing demo data set is generated in a temporary folder."""
    root = find_data(settings.path_to_data)
    if root.name != MOTIONS or root.exists():
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="tvit-") as folder:
        report(Note(f"{root} is missing: the demo data set is generated in a temporary folder."))
        made = Path(folder) / MOTIONS
        make_demo_data(made, report)
        yield settings.model_copy(update={"path_to_data": str(made)})


def _measure(loop: Loop) -> DryRun:
    settings, plan, config = loop.settings, loop.plan, loop.built.config
    trainable, total = trainable_report(loop.plain_model)
    free = free_bytes(loop.device, local_processes())
    probe = Probe(loop.built, loop.plain_model, loop.accelerator, averages=loop.ema is not None)
    memory = probe.memory_model()
    pass_flops = _measured_flops(lambda: probe.run(loop.plain_model, 1))
    loop.optimizer.zero_grad()
    seconds, wait = _time_steps(loop)
    return DryRun(
        folder=loop.run.folder,
        model=f"{settings.pretrained or 'from scratch'}: {plural(config.depth, 'block')}, {config.width} wide, "
        f"{config.attention} attention",
        data=plan_facts(loop)["data"],
        device=str(loop.device),
        precision=settings.mixed_precision,
        parameters=total,
        trainable=trainable,
        forward_flops=count_flops(config),
        pass_flops=pass_flops,
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


def count_flops(config: ViTConfig, n_frames: int | None = None) -> int:
    """FLOPs of one clip's forward pass, two per multiply-add, matrix products only; nothing is computed."""
    size = config.frame_size
    with torch.device("meta"):
        model = TemporalViT(config, initialise=False).eval()
        clip = torch.zeros(1, n_frames or config.n_frames, config.num_channels, size, size)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # fused attention is not counted
        return _measured_flops(lambda: model(clip))


def _measured_flops(work: Callable[[], object]) -> int:
    """FLOPs of `work`, counted while it runs, backward passes and recomputed blocks included."""

    def forward(query: torch.Size, key: torch.Size, *others: Any, **options: Any) -> int:
        return 4 * math.prod(query) * key[-2]  # 2 products of queries (…, Q, D/A) and keys (…, N, D/A)

    def backward(gradient: Any, query: torch.Size, key: torch.Size, *others: Any, **options: Any) -> int:
        return 10 * math.prod(query) * key[-2]  # 5 products: the weights again, then four gradients

    aten = torch.ops.aten  # PyTorch's counter does not count its attention on a CPU
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return int(counter.get_total_flops())


def _time_steps(loop: Loop) -> tuple[float, float]:
    """Seconds per step and the share spent waiting for data, without the first step; none begins after 60 s."""
    loop.step = 0  # a resumed run may have few steps left
    loop.model.train()
    clock, begun = Clock.of(loop.device), time.perf_counter()
    with closing(remaining_batches(loop)) as batches:
        for planned, batch in batches:
            clock.wait_ended()
            forward_backward(loop, planned, batch)
            if planned.ends_step:
                update(loop)
                loop.step += 1
                if loop.device.type != "cpu":
                    torch.accelerator.synchronize(loop.device)
                loop.report(Progress("measuring steps", loop.step, STEPS + 1))
                is_late = any_rank(time.perf_counter() - begun > 60, loop.accelerator)
                if is_late or loop.step > STEPS or loop.step == loop.plan.total_steps:
                    break
                if loop.step == 1:
                    clock = Clock.of(loop.device)
            clock.wait_started()
    facts = clock.facts()
    return facts["seconds"] / max(1, loop.step - 1), facts["data_wait"]


def _time_validation(loop: Loop) -> float:
    """Seconds of a validation, extrapolated from at most 32 videos of each rank."""
    videos = loop.source.readable("val")
    if not videos:
        return 0.0
    some = videos[: 32 * loop.plan.processes]
    begun = time.perf_counter()
    loop.score(some, "measuring validation")
    return (time.perf_counter() - begun) * len(videos) / len(some)
