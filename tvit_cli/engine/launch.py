"""Rank, world size, device and all-gather of this process; precision, stop signals, and local launch."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch.distributed import DistError

from tvit_cli.data.clips import is_waiting
from tvit_cli.engine.distributed import (
    BACKENDS,
    JOIN_TIMEOUT,
    TIMEOUT,
    all_reduce_max,
    preserve_process_count,
    set_timeout,
)
from tvit_cli.errors import Interrupted, ModelError, RunError, SettingsError, plural
from tvit_cli.results import Event, Note, Report, silent
from tvit_cli.settings.types import MixedPrecision

if TYPE_CHECKING:  # importing Accelerate takes longer than labelling a few videos
    from accelerate import Accelerator

Precision = Literal["no", "bf16", "fp16"]
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # with these values cuBLAS is deterministic (its documentation, 2.1.4)
WORKSPACES = (":4096:8", ":16:8")
FAST_BF16 = (8, 0)  # CUDA compute capability of the first tensor cores with bfloat16 (Ampere white paper)
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}  # 75: EX_TEMPFAIL, "requeue" for job queues
HAS_TIMER = hasattr(signal, "setitimer")  # Windows has none
SECONDS_TO_GET_BATCH = 5  # limit of the wait for a batch after a stop signal
SECONDS_TO_BE_ENDED = 3  # a launcher checks for dead processes several times a second
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 60  # limit for a stopped process to finish its step and write its checkpoint
SHARDING = {  # variables that `accelerate launch` sets: what shards tensors or samples across ranks
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context or sequence parallelism)",
}
RESUME_LATEST = "Resume from the last checkpoint with --resume-from-checkpoint latest."


def pick_device(name: str) -> torch.device:
    """The device of a name; auto is CUDA, then MPS, then CPU. Raises ModelError if this machine has none."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in has if has[kind]))
    if not has.get(name.partition(":")[0], True):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if name.startswith("cuda") and visible is not None and torch.version.cuda is not None:
            raise ModelError(
                f"--device {name}: no GPU can be used with CUDA_VISIBLE_DEVICES={visible!r}. Unset it, or name one "
                "that nvidia-smi lists. Else take --device cpu."
            )
        raise ModelError(
            f"--device {name}: this machine has none that PyTorch {torch.__version__} can use. "
            "Take --device cpu, or install a PyTorch build for your GPU."
        )
    return torch.device(name)


def resolve_precision(given: MixedPrecision, device: torch.device) -> Precision:
    """The number format of a setting on a device; of `auto` on a CPU, "no". See Note [Mixed precision].

    Turns TF32 off for float32 convolutions on CUDA: its 10 bits of mantissa are PyTorch's default there. Raises
    SettingsError for fp16 on a CPU: Accelerate would silently compute in float32.
    """
    if given == "fp16" and device.type == "cpu":
        raise SettingsError("--mixed-precision fp16: not supported on a CPU. Take bf16, or no.")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    if given != "auto":
        return given
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FAST_BF16
    return "bf16" if is_fast and torch.cuda.is_bf16_supported() else "no"


# Note [Mixed precision]
# ~~~~~~~~~~~~~~~~~~~~~~
# `auto` is bfloat16 on GPUs with hardware for it, else float32. bfloat16 has float32's range, so no run needs loss
# scaling or overflows. On CPUs a product of the model's width, timed in both, decides once the model is known
# (`model.linear.bf16_speedup`): processors are up to ten times as fast in bfloat16, others slower.
# float16 on older GPUs is no default: it is fast, but an overflow of its small range ends a run after hours.


@contextmanager
def deterministic_algorithms(enabled: bool, device: str) -> Iterator[None]:
    """With `enabled`, PyTorch uses deterministic algorithms only within the block: equal inputs give equal bits.

    Raises SettingsError if cuBLAS may have started with another workspace, RunError for an operation without such
    an algorithm. On CUDA the variable for cuBLAS stays set, as cuBLAS reads it once per process.
    """
    if not enabled:
        yield
        return
    chosen, workspace = pick_device(device), os.environ.get(WORKSPACE)
    if chosen.type == "cuda" and workspace not in WORKSPACES:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise SettingsError(
                f"--deterministic: this process has used a GPU with {WORKSPACE} {workspace or 'unset'}. "
                f"Set it to {WORKSPACES[0]} before the process starts."
            )
        os.environ[WORKSPACE] = WORKSPACES[0]
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # for debugging: it writes all new memory once more
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        text = f"PyTorch {torch.__version__} has no deterministic {operation} on {chosen.type}"
        raise RunError(f"--deterministic: {text}. Leave it out, or the option that needs this.") from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before


def make_accelerator(*, device: str, mixed_precision: MixedPrecision) -> Accelerator:
    """An Accelerator on a device, with the precision that `auto` means there.

    Raises ModelError if this machine has no such device, SettingsError for a sharded model or more processes than
    GPUs, RunError if the processes cannot connect.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    chosen = pick_device(device)
    _refuse_sharding(chosen)
    _refuse_shared_gpus(chosen)
    # Else a second training in one process would keep the first's precision and, without a group, its device.
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=is_alone)
    precision = resolve_precision(mixed_precision, chosen)
    group = InitProcessGroupKwargs(backend=BACKENDS.get(chosen.type), timeout=JOIN_TIMEOUT)
    # Buckets are filled anew in the order of the first backward pass unless unused parameters are looked for. A
    # resumed training would then sum other pieces than one that was not interrupted, with other last digits.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
    )
    warnings.filterwarnings(
        "ignore", "`broadcast_buffers` is deprecated"
    )  # its successor is new in PyTorch 2.13
    try:
        with preserve_process_count():
            accelerator = Accelerator(
                cpu=chosen.type == "cpu",
                mixed_precision=precision,
                # Else taken from the environment: gradients are divided by the clips of an update, not here.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                kwargs_handlers=[] if is_alone else [group, ddp],
            )
        set_timeout(TIMEOUT)
    except NotImplementedError as error:  # GPUs without peer-to-peer communication in the installed driver
        raise SettingsError(f"Accelerate will not start here: {error}") from error
    except DistError as error:
        host, port = os.environ.get("MASTER_ADDR", "this machine"), os.environ.get("MASTER_PORT", "?")
        reason = f"{str(error).splitlines()[0]}. Check MASTER_ADDR, and that every machine can reach it."
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            reason = (
                "the port is in use. Set MASTER_PORT (torchrun --master-port, accelerate launch "
                "--main_process_port) to a free one, or let --num-processes choose it."
            )
        raise RunError(f"The processes could not connect at {host}, port {port}: {reason}") from error
    return accelerator


def _refuse_sharding(device: torch.device) -> None:
    from accelerate.utils import parse_flag_from_env

    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            reason = "it shards tensors, and a checkpoint holds whole ones"
            if device.type == "cpu":
                reason = "Accelerate silently ignores it on a CPU"
            raise SettingsError(
                f"{variable}={os.environ[variable]}: {name} is not supported: {reason}. Remove it from "
                "Accelerate's config. To save memory: --per-gpu-batch-size auto, --gradient-checkpointing."
            )


def _refuse_shared_gpus(device: torch.device) -> None:
    """Raises SettingsError if two processes would share a GPU: NCCL fails then, and MPS has no collectives."""
    processes = int(os.environ.get("WORLD_SIZE" if device.type == "mps" else "LOCAL_WORLD_SIZE", "1"))
    gpus = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, processes)
    has_its_own = device.type == "cuda" and gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if processes > gpus and not has_its_own:
        raise SettingsError(
            f"{processes} processes on a machine with {plural(gpus, 'GPU')}: each process needs one of its own. "
            f"Take --num-processes {gpus}, or --device cpu."
        )


@contextmanager
def lost_rank_errors() -> Iterator[None]:
    """Turns a broken connection to another rank into a RunError, once the launcher had time to report the cause."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_TO_BE_ENDED)
        reason = "Another process of this training has ended, so this one ends, too."
        raise RunError(f"{reason} {RESUME_LATEST}") from error


def signal_text(name: str) -> str:
    """The name of a signal for users. SIGINT -> Ctrl-C"""
    return "Ctrl-C" if name == "SIGINT" else name


class ImmediateStop:
    """Within this context, SIGINT, SIGTERM and SIGUSR1 raise Interrupted with `advice`: nothing needs saving."""

    def __init__(self, advice: str = "", report: Report = silent) -> None:
        self.advice, self._report = advice, report
        self._before: dict[int, Any] = {}  # signal number -> handler

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            own = {getattr(signal, k): v for k, v in self._handlers().items() if hasattr(signal, k)}
            self._before = {number: signal.signal(number, handler) for number, handler in own.items()}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handlers(self) -> dict[str, Any]:
        return dict.fromkeys(EXIT_CODES, self._handle)

    def _acknowledge(self, text: str) -> None:
        with suppress(RuntimeError):  # a write to stderr was interrupted
            self._report(Note(text))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._acknowledge("Stopping…")
        raise Interrupted(f"Stopped by {signal_text(name)}. {self.advice}", exit_code=EXIT_CODES[name])


class StopSignals(ImmediateStop):
    """Within this context, SIGINT, SIGTERM and SIGUSR1 request a stop after the step; a second SIGINT stops now.

    A signal that was not acted upon when the context ends is raised again for the handlers before. If no batch
    arrives within SECONDS_TO_GET_BATCH after a signal, Interrupted is raised in the wait.
    """

    received: str | None = None

    def _handlers(self) -> dict[str, Any]:
        return {**super()._handlers(), "SIGALRM": self._stop_waiting}

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._before and HAS_TIMER:
            signal.setitimer(signal.ITIMER_REAL, 0)
        super().__exit__(kind, error, trace)
        if error is None and self.received:
            signal.raise_signal(signal.Signals[self.received])

    def agreed(self, accelerator: Accelerator, *, save_is_due: bool) -> tuple[str | None, bool]:
        """A signal that any rank has received, and whether a save is due on any; the same on all ranks."""
        names = list(EXIT_CODES)
        own = names.index(self.received) + 1 if self.received else 0
        number, due = all_reduce_max([own, int(save_is_due)], accelerator)
        return names[number - 1] if number else None, bool(due)

    def stopping(self, report: Report) -> Report:
        """A report whose first KeyboardInterrupt requests a stop after the step, as Ctrl-C does."""

        def guarded(event: Event) -> None:
            try:
                report(event)
            except KeyboardInterrupt:
                if self.received:
                    raise
                self.received = "SIGINT"

        return guarded

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT":
            raise KeyboardInterrupt
        if self.received is None:
            again = " Ctrl-C again stops at once." if name == "SIGINT" else ""
            self._acknowledge(f"Stopping after this step, with a checkpoint.{again}")
        self.received = name
        if HAS_TIMER:
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_GET_BATCH, 1)

    def _stop_waiting(self, number: int, frame: FrameType | None) -> None:
        if is_waiting() and self.received:
            signal.setitimer(signal.ITIMER_REAL, 0)
            text = f"Stopped by {signal_text(self.received)} while waiting for videos. {RESUME_LATEST}"
            error = Interrupted(text, exit_code=EXIT_CODES[self.received])
            error.by_all = False  # other ranks may be waiting for this one
            raise error


@dataclass(frozen=True)
class ProcessGroup:
    """Rank, world size, device and all-gather of this process."""

    rank: int
    processes: int
    device: torch.device
    gather: Callable[[Any], list[Any]]  # returns the objects of all ranks, in the order of their ranks

    @classmethod
    def of(cls, accelerator: Accelerator) -> ProcessGroup:
        """The process group of an Accelerator."""
        from accelerate.utils import gather_object

        rank, processes = accelerator.process_index, accelerator.num_processes
        return cls(rank, processes, accelerator.device, lambda own: list(gather_object([own])))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0


def join_process_group(device: str) -> ProcessGroup:
    """The process group of the launcher, else this process alone. Raises ModelError for a missing device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup(0, 1, pick_device(device), lambda own: [own])
    return ProcessGroup.of(make_accelerator(device=device, mixed_precision="no"))


def is_launched() -> bool:
    """Whether torchrun, `accelerate launch` or `run_local_processes` started this process."""
    return "WORLD_SIZE" in os.environ


def exit_with_launcher() -> None:
    """Ends this process when its launcher is gone: a killed launcher cannot end its processes."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, `accelerate launch` and `run_local_processes`
        threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def run_local_processes(count: int, arguments: Sequence[str], *, resumes: bool) -> int:
    """Runs `python -m tvit_cli <arguments>` in `count` processes of one group; returns their exit code.

    Stop signals are forwarded. If one process fails, the others are ended; RunError if the first was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes print their own errors
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    signals = ",".join((*EXIT_CODES, "SIGHUP"))
    optional: dict[str, Any] = {"signals_to_handle": signals, "shutdown_timeout": SECONDS_TO_SAVE}
    supported = {field.name for field in fields(LaunchConfig)}  # depends on PyTorch's version
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port, so that several trainings on one machine stay apart
        max_restarts=0,
        monitor_interval=0.1,
        **{name: value for name, value in optional.items() if name in supported},
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tvit_cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise RunError(
                f"Process {rank} of {count} was killed ({name}), so all were ended. If memory ran out, take a "
                f"smaller --per-gpu-batch-size. {RESUME_LATEST if resumes else 'Then start again.'}"
            ) from error
        return int(failure.exitcode)
    except SignalException as error:
        return EXIT_CODES.get(error.sigval.name, 128 + error.sigval.value)
    return 0
