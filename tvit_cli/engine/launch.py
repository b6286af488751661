"""The process a training runs in: Accelerate's accelerator, and the signals that ask it to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch.distributed import DistError

from tvit_cli.data.loading import is_waiting
from tvit_cli.engine.parallel import greatest_of_them
from tvit_cli.engine.precision import resolve_precision
from tvit_cli.engine.source import counted_as_before
from tvit_cli.engine.trained import pick_device
from tvit_cli.errors import Interrupted, RunError, SettingsError
from tvit_cli.settings.fields import MixedPrecision

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
        with counted_as_before():
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
def ends_with_the_others() -> Iterator[None]:
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
        number, due = greatest_of_them([own, int(save_is_due)], accelerator)
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


class StopsAtOnce:
    """Within this context, SIGINT, SIGTERM and SIGUSR1 raise Interrupted with `advice`: nothing has to be saved."""

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopsAtOnce:
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
