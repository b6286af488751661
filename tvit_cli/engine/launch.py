"""Start of a process: device, precision, Accelerator, stop signals, rank and world size, local launch."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch.distributed import DistError

from tvit_cli.data.clips import is_waiting
from tvit_cli.engine.distributed import all_reduce_max, preserve_process_count
from tvit_cli.errors import Interrupted, ModelError, RunError, SettingsError
from tvit_cli.settings.types import MixedPrecision

Precision = Literal["no", "bf16", "fp16"]

FAST_BF16 = (8, 0)  # CUDA compute capability: the first whose tensor cores take bfloat16 (Ampere white paper)


def resolve_precision(given: MixedPrecision, device: torch.device) -> Precision:
    """The format that a setting means on a device. See Note [Mixed precision].

    From then on convolutions in float32 are what they are called on CUDA as well: as torch starts, those take
    inputs of TF32, with 10 bits of mantissa.

    Raises SettingsError for fp16 on a CPU: Accelerate would compute in float32 and say nothing.
    """
    if given == "fp16" and device.type == "cpu":
        raise SettingsError("--mixed-precision fp16: nothing is computed in it on a CPU. Take bf16, or no.")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    if given != "auto":
        return given
    return "bf16" if device.type == "cuda" and _is_fast_at_bf16(device) else "no"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, a forward pass computes in that format."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


# Note [Mixed precision]
# ~~~~~~~~~~~~~~~~~~~~~~
# `auto` is bfloat16 on a GPU with the hardware for it, and nothing elsewhere: bfloat16 has float32's range, so no
# run needs a scaled loss or falls over for it. On CPUs it is slower, or a fifth faster where they have AVX512-BF16
# (docs/negative-results.md): not worth numbers of another format unasked. float16 on older GPUs was refused as a
# default: it is fast there, but its range is small, and a run that fails for it fails after hours. Whoever has such
# a card asks for `fp16`.


def _is_fast_at_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FAST_BF16 and torch.cuda.is_bf16_supported()


EXIT_CODES = {
    "SIGINT": 130,
    "SIGTERM": 143,
    "SIGUSR1": 75,
}  # 75: EX_TEMPFAIL, which queues take for "requeue"
SECONDS_TO_GET_BATCH = 5  # after a signal that asks for a stop, a batch is waited for no longer
SECONDS_TO_BE_ENDED = 3  # a launcher looks for dead processes several times a second


# What splits a model between processes, and the variable by which `accelerate launch` asks for it.
SPLITTERS = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}


def make_accelerator(*, device: str, mixed_precision: MixedPrecision) -> Accelerator:
    """An Accelerator on the device asked for, with the precision that `auto` means there.

    Raises ModelError when this machine has no such device, SettingsError where `accelerate launch` was told to
    split the model or there are more processes than GPUs, RunError when the processes cannot find each other.
    """
    chosen = pick_device(device)
    _refuse_split_models(chosen)
    _refuse_shared_gpus(chosen)
    AcceleratorState._reset_state()  # else a second training in one process would keep the first's precision
    precision = resolve_precision(mixed_precision, chosen)
    try:
        with preserve_process_count():
            return Accelerator(cpu=chosen.type == "cpu", mixed_precision=precision)
    except NotImplementedError as error:  # GPUs that cannot talk to each other with the driver that is there
        raise SettingsError(f"Accelerate will not start here: {error}") from error
    except DistError as error:
        place = f"{os.environ.get('MASTER_ADDR', 'this machine')}, port {os.environ.get('MASTER_PORT', '?')}"
        in_use = "EADDRINUSE" in str(error) or "address already in use" in str(error)
        raise RunError(
            f"The processes could not meet at {place}: "
            + (
                "the port is in use. Set MASTER_PORT (torchrun --master-port, accelerate launch "
                "--main_process_port) to a free one, or let --num-processes choose it."
                if in_use
                else f"{str(error).splitlines()[0]}. Is MASTER_ADDR right, and can every machine reach it?"
            )
        ) from error


@contextmanager
def lost_rank_errors() -> Iterator[None]:
    """Within this block, a connection to another process that breaks is a RunError: that process has ended.

    Who started the processes knows why, and ends this one; so it waits a little to be ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_TO_BE_ENDED)
        raise RunError(
            "Another process of this training has ended, so this one does, too. Go on from the last checkpoint "
            "with --resume-from-checkpoint latest."
        ) from error


def _refuse_split_models(device: torch.device) -> None:
    for name, variable in SPLITTERS.items():
        if parse_flag_from_env(variable):
            reason = (
                "Accelerate ignores it without a word on a CPU"
                if device.type == "cpu"
                else "a checkpoint holds whole tensors, which it takes apart"
            )
            raise SettingsError(
                f"{variable}={os.environ[variable]}: {name} is not supported: {reason}. Take it out of "
                "Accelerate's config: processes then share the clips, each with the whole model. What makes that "
                "fit: --per-gpu-batch-size auto, --gradient-checkpointing."
            )


def _refuse_shared_gpus(device: torch.device) -> None:
    """Raises SettingsError where two processes would get one GPU: NCCL fails then, and MPS knows of no others."""
    counted = "WORLD_SIZE" if device.type == "mps" else "LOCAL_WORLD_SIZE"
    processes = int(os.environ.get(counted, "1"))
    gpus = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, processes)
    has_its_own = device.type == "cuda" and gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if processes > gpus and not has_its_own:
        raise SettingsError(
            f"{processes} processes on a machine with {gpus} GPU{'s' if gpus > 1 else ''}: each process needs one "
            f"of its own. Take --num-processes {gpus}, or --device cpu."
        )


class StopSignals:
    """Within this context, SIGINT, SIGTERM and SIGUSR1 ask for a stop; a second SIGINT stops at once.

    One that nobody has acted upon when the context ends well is handed to whoever handled it before. Where a batch
    does not arrive within SECONDS_TO_GET_BATCH after the signal, Interrupted is raised in the wait.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self._before = _handle_with(self._handle)
        if self._before and hasattr(signal, "setitimer"):
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._stop_waiting)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        _restore(self._before)
        if error is None and self.received:
            signal.raise_signal(signal.Signals[self.received])

    def agreed(self, accelerator: Accelerator, *, save_is_due: bool) -> tuple[str | None, bool]:
        """The signal that any process has received, and whether a save is due in any; the same for all."""
        names = list(EXIT_CODES)
        own = names.index(self.received) + 1 if self.received else 0
        number, due = all_reduce_max([own, int(save_is_due)], accelerator)
        return names[number - 1] if number else None, bool(due)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = name
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_GET_BATCH, 1)

    def _stop_waiting(self, number: int, frame: FrameType | None) -> None:
        if is_waiting() and self.received:
            signal.setitimer(signal.ITIMER_REAL, 0)
            error = Interrupted(
                f"Stopped by {self.received} while waiting for videos. Go on from the last checkpoint with "
                "--resume-from-checkpoint latest.",
                exit_code=EXIT_CODES[self.received],
            )
            error.by_all = False  # the others may be waiting for this process
            raise error


class ImmediateStop:
    """Within this context, SIGINT, SIGTERM and SIGUSR1 raise Interrupted with `advice`: nothing has to be saved."""

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self._before: dict[int, object] = {}

    def __enter__(self) -> ImmediateStop:
        self._before = _handle_with(self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Interrupted(f"Stopped by {name}. {self.advice}", exit_code=EXIT_CODES[name])


def _handle_with(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Handle the signals that ask for a stop; the handlers before. Only a main thread can, others change none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)]
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(handlers: dict[int, object]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ProcessGroup:
    """Rank of this process, how many there are, its device, and how their results come together.

    `gather` gives every process the objects of all, in the order of their ranks.
    """

    rank: int
    processes: int
    device: torch.device
    gather: Callable[[Any], list[Any]]

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0


def join_process_group(device: str) -> ProcessGroup:
    """This process's place, as torchrun, `accelerate launch` or `--num-processes` started it.

    Raises ModelError when this machine has no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup(0, 1, pick_device(device), lambda own: [own])
    from accelerate.utils import (
        gather_object,  # only here: importing it takes longer than scoring a few videos
    )

    accelerator = make_accelerator(device=device, mixed_precision="no")
    return ProcessGroup(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        lambda own: list(gather_object([own])),
    )


SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 60  # what a stopped process is given to finish its step and write its checkpoint


def is_launched() -> bool:
    """Whether torchrun, `accelerate launch` or `run_processes` started this process."""
    return "WORLD_SIZE" in os.environ


def exit_with_launcher() -> None:
    """Let this process end when the launcher that started it is gone: killed, it can end nobody any more."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, `accelerate launch` and `run_processes` are parents
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def run_local_processes(count: int, arguments: Sequence[str], *, resumes: bool) -> int:
    """Run `python -m tvit_cli <arguments>` in `count` processes of one group; the exit code of them all.

    SIGINT, SIGTERM and SIGUSR1 are handed on, and each process saves and stops as a single one would. When one
    dies, the others are ended. Raises RunError where the first to fail was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes say themselves what failed
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    known = {field.name for field in fields(LaunchConfig)}
    signals = ",".join((*EXIT_CODES, "SIGHUP"))
    optional: dict[str, Any] = {"signals_to_handle": signals, "shutdown_timeout": SECONDS_TO_SAVE}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port of its own: several trainings on one machine do not meet
        max_restarts=0,
        monitor_interval=0.1,
        **{name: value for name, value in optional.items() if name in known},
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tvit_cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise RunError(
                f"Process {rank} of {count} was killed ({name}), so all were ended. If memory ran out, take a "
                "smaller --per-gpu-batch-size. "
                + (
                    "Go on from the last checkpoint with --resume-from-checkpoint latest."
                    if resumes
                    else "Then start again."
                )
            ) from error
        return int(failure.exitcode)
    except SignalException as error:
        return EXIT_CODES.get(error.sigval.name, 128 + error.sigval.value)
    return 0


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def pick_device(name: str) -> torch.device:
    """The device that a name means; auto is CUDA, then MPS, then CPU.

    Raises ModelError when a device was asked for that this machine does not have.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not has_mps):
        raise ModelError(
            f"--device {name}: this machine has none that PyTorch {torch.__version__} can use. "
            "Take --device cpu, or install a PyTorch build for your GPU."
        )
    return torch.device(name)
