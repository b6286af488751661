"""Hooks into a training process: a fault at a chosen call, or float64 computation.

Python imports this file by itself where its folder stands on PYTHONPATH, in a training and in every process that it
starts. It reads one variable each, and does nothing where that is not set:

    FUSE     JSON, `Fuse`'s fields: at the nth call of a phase, a signal is sent or the disk is filled
    FLOAT64  the model, its gradients and its optimizer are in float64; clips are cut and coloured in float32 as ever

The product knows nothing of it: modules are changed as they are imported.
"""

import builtins
import errno
import functools
import importlib.machinery
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

FILL = 1 << 20  # bytes that the filler grows by


@dataclass
class Fuse:
    """When to blow, and what happens then. Only the processes of a rank count, each for itself."""

    phase: str
    nth: int
    how: str  # SIGKILL, SIGTERM, SIGINT, SIGUSR1, "disk full", or "out of memory"
    target: str  # self: the process that is there; top: the one that was started; group: all of its group
    marker: str  # written when it blows, once: the checkpoints that were whole then
    folder: str  # what is on the disk that gets full
    filler: str | None  # the file that fills it; None: files that are opened below `folder` take no byte
    rank: int = 0
    calls: int = 0
    is_full: bool = False

    def reached(self, phase: str) -> None:
        """Count a call of a phase, and blow at the nth."""
        if phase != self.phase or int(os.environ.get("RANK", "0")) != self.rank:
            return
        self.calls += 1
        if self.calls != self.nth:
            return
        try:
            descriptor = os.open(self.marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        whole = sorted(path.name for path in Path(self.folder).glob("*/checkpoints/step-*"))
        os.write(descriptor, json.dumps({"pid": os.getpid(), "checkpoints": whole}).encode())
        os.close(descriptor)
        self._blow()

    def _blow(self) -> None:
        if self.how == "disk full":
            self._fill()
            return
        if self.how == "out of memory":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory.")
        number = signal.Signals[self.how]
        top = int(os.environ["FUSE_TOP"])
        if self.target == "self":
            os.kill(os.getpid(), number)
        elif self.target == "top":
            os.kill(top, number)
        else:
            os.killpg(top, number)

    def _fill(self) -> None:
        if self.filler is None:
            self.is_full = True
            _refuse_writes(Path(self.folder))
            return
        size = FILL
        with Path(self.filler).open("wb", buffering=0) as file:
            while size:
                try:
                    size = size if file.write(b"\0" * size) == size else size // 2
                except OSError:
                    size //= 2


def _refuse_writes(folder: Path) -> None:
    """From now on, what is opened for writing below a folder is there, but takes no byte."""
    real = io.open

    @functools.wraps(real)
    def refusing(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        is_path = isinstance(file, str | os.PathLike)
        if is_path and set(mode) & set("wax+") and folder in Path(file).absolute().parents:
            real(file, mode, *arguments, **keywords).close()
            return real("/dev/full", mode.replace("x", "w").replace("a", "w"), *arguments, **keywords)
        return real(file, mode, *arguments, **keywords)

    io.open = builtins.open = refusing  # type: ignore[assignment]


def _before(fuse: Fuse, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        fuse.reached(phase)
        return real(*arguments, **keywords)

    return wrapped


def _fuse_in_clips(fuse: Fuse, module: ModuleType) -> None:
    real = module.ClipDataset._read

    def read(dataset: Any, epoch: int, index: int) -> Any:
        if dataset.training:
            fuse.reached("decode")
        return real(dataset, epoch, index)

    module.ClipDataset._read = read


def _fuse_in_checkpoint(fuse: Fuse, module: ModuleType) -> None:
    """Blows in the middle of a file that is written, and in the middle of a checkpoint that is removed."""
    write, prune, remove = module._write, module.prune_checkpoints, module.remove_own

    def half_written(path: Path, data: bytes) -> None:
        with suppress(OSError):
            path.write_bytes(data[: len(data) // 2])
        fuse.reached("checkpoint write")
        write(path, data)

    def half_removed(path: Path, own: Any) -> None:
        if files := sorted(path.glob("*")):
            files[0].unlink()
            fuse.reached("checkpoint prune")
        remove(path, own)

    def pruning(*arguments: Any, **keywords: Any) -> None:
        module.remove_own = half_removed
        prune(*arguments, **keywords)
        module.remove_own = remove

    module._write, module.prune_checkpoints = half_written, pruning


def _fuse_in_loop(fuse: Fuse, module: ModuleType) -> None:
    module.update = _before(fuse, "step", module.update)
    module.loss_share = _before(fuse, "pass", module.loss_share)


def _fuse_in_loopstate(fuse: Fuse, module: ModuleType) -> None:
    score = module.score

    def scoring(*arguments: Any, progress: Callable[[int, int], None], **keywords: Any) -> Any:
        def first_batch(done: int, total: int) -> None:
            progress(done, total)
            if not seen:
                seen.append(done)
                fuse.reached("validation")

        seen: list[int] = []
        return score(*arguments, progress=first_batch, **keywords)

    module.score = scoring


def _fuse_in_folder(fuse: Fuse, module: ModuleType) -> None:
    save = module.save_file

    def half_saved(tensors: Any, path: Path, **keywords: Any) -> None:
        save(tensors, path, **keywords)
        os.truncate(path, path.stat().st_size // 2)
        fuse.reached("end-of-run save")
        if fuse.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path, **keywords)

    module.save_file = half_saved


def float64_in_inputs(module: ModuleType) -> None:
    module.train_transform = _float64(module.train_transform)


def float64_in_scoring(module: ModuleType) -> None:
    module.eval_transform = _float64(module.eval_transform)


def _float64(transform: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(transform)
    def transformed(*arguments: Any, **keywords: Any) -> Any:
        torch.set_default_dtype(torch.float32)
        try:
            return transform(*arguments, **keywords).double()
        finally:
            torch.set_default_dtype(torch.float64)

    torch.set_default_dtype(torch.float64)
    return transformed


class _Changes:
    """A finder of modules that changes some of them once they have run."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None, name
        run, change = spec.loader.exec_module, self._changes[name]

        def exec_module(module: ModuleType) -> None:
            run(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "FUSE" in os.environ:
    os.environ.setdefault("FUSE_TOP", str(os.getpid()))
    _fuse = Fuse(**json.loads(os.environ["FUSE"]))
    sys.meta_path.insert(
        0,
        _Changes(
            {
                "tvit_cli.data.clips": functools.partial(_fuse_in_clips, _fuse),
                "tvit_cli.engine.train.checkpoint": functools.partial(_fuse_in_checkpoint, _fuse),
                "tvit_cli.engine.train.state": functools.partial(_fuse_in_loopstate, _fuse),
                "tvit_cli.engine.train.loop": functools.partial(_fuse_in_loop, _fuse),
                "tvit_cli.model.folder": functools.partial(_fuse_in_folder, _fuse),
            }
        ),
    )
if "FLOAT64" in os.environ:
    sys.meta_path.insert(
        0,
        _Changes(
            {
                "tvit_cli.engine.train.batches": float64_in_inputs,
                "tvit_cli.engine.evaluate.scoring": float64_in_scoring,
            }
        ),
    )
