"""Clip data sets and batches of uint8 frames, prefetched by threads or worker processes.

Letters: B clips, T frames, C channels, H W pixels.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from tvit_cli.data.augment import Kind, draw_generator
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video
from tvit_cli.data.video import ByTime, Choice, Clip, Frames, Order, read_clip
from tvit_cli.errors import RunError, TvitError, VideoError
from tvit_cli.portable.reading import Key, Times, clip_offsets, dense_indices, segment_indices

# Note [Threads for frame stores]
# Between processes, a clip of 18 frames of 320x240 (4 MB) costs a thousand fresh pages of shared memory: 15 ms of
# CPU time per clip, 6 ms with threads (docs/negative-results.md). libjpeg-turbo, zlib and the file system release
# Python's lock, so threads run in parallel. Videos are decoded by processes: FFmpeg may crash on a damaged file.

# Note [Workers are not forked]
# A fork copies the locks of NCCL's, gloo's and CUDA's threads: workers would deadlock (DistributedDataParallel's
# documentation). Where one of them runs, workers are forked from a server process that has only imported torch.
# Like spawned ones, they must not import the main script: it would run again.

# Note [Small shared memory]
# Docker gives a container 64 MB of /dev/shm. torch moves tensors there in a thread of the worker's queue, where an
# error is printed and lost, and the main process waits forever. So a worker moves its batch itself and uses at
# most half of the free bytes: the rest is for semaphores and other workers. A batch that does not fit becomes a
# temporary file. An error in the queue's thread is sent instead of the batch.
_SHARED_MEMORY = Path("/dev/shm")
_STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_SECONDS_TO_END = 5  # before worker processes are killed

_is_waiting = False


@dataclass(frozen=True, slots=True)
class ClipItem:
    """One clip of a batch; an unreadable video has weight 0 and an `error`."""

    frames: Tensor  # uint8 (T, C, H, W), channels last in memory; several clips are concatenated
    label: int
    epoch: int
    index: int
    weight: float
    error: str
    note: str = ""  # on the video's orientation


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """Clips of one batch, each in its video's size."""

    clips: list[Tensor]  # B times uint8 (T, C, H, W)
    labels: Tensor  # int64 (B,)
    epochs: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,)
    weights: Tensor  # float32 (B,); 0 for an unreadable video
    errors: list[tuple[int, str]]  # (index, reason) of unreadable videos
    notes: list[tuple[int, str]] = field(default_factory=list)  # (index, note) on videos that are read

    def pin_memory(self) -> ClipBatch:
        """The batch in page-locked memory; torch's DataLoader calls this by name."""
        names = ("labels", "epochs", "indices", "weights")
        pinned = {name: getattr(self, name).pin_memory() for name in names}
        return replace(self, clips=[clip.pin_memory() for clip in self.clips], **pinned)


@dataclass(eq=False)
class ClipDataset(Dataset[ClipItem]):
    """One clip per video, by key (epoch, index).

    In training, frames are drawn within their segments from (seed, epoch, index) alone: clips depend neither on a
    resume nor on the number of workers. Otherwise `clips_per_video` clips are taken at even offsets within the
    segments (one: their centres) and concatenated. With `clip_seconds`, a clip is that part of the video, from a
    place drawn in the same way, or from even places (see `dense_indices`). `shuffle_frames` permutes the frames,
    the same way in every epoch (ablation). An unreadable video becomes black frames of weight 0: all ranks keep
    the same number of steps.

    Frames come from the `store` if given, else from the videos. `grid` restricts both to the frames of a store with
    that many frames per video: the choice is identical. Without it, the store gives its nearest frames.
    """

    videos: Sequence[Video]
    labels: Sequence[str]
    _: KW_ONLY
    n_frames: int
    short_side: int
    seed: int
    training: bool
    shuffle_frames: bool = False
    store: FrameStore | None = None
    grid: int | None = None
    clip_seconds: float | None = None
    clips_per_video: int = 1
    time_limit: float | None = None  # seconds to decode a video
    # Number, times or order of the frames of videos read so far, in this worker.
    _known: dict[int, int | Times | Order] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.clips_per_video == 1 or not self.training
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Key) -> ClipItem:
        epoch, index = key
        video = self.videos[index]
        label = self._numbers[video.label]
        try:
            clip = self._read(epoch, index)
        except VideoError as error:
            return self.unreadable(key, str(error).removeprefix(f"{video.source}: "))
        self._known[index] = clip.order or clip.times or clip.frame_count
        note = clip.note
        wanted, length = self.clip_seconds, math.inf if clip.times is None else clip.times.end
        if wanted is not None and length < wanted:
            short = f"lasts {length:.2f} s, less than a clip of {wanted:.3g} s: its last frame is repeated"
            note = "; ".join(filter(None, (note, short)))
        frames = torch.from_numpy(clip.frames)  # (T * clips, H, W, C): clip by clip, else by segment
        if self.clips_per_video > 1 and self.clip_seconds is None:
            frames = frames.view(-1, self.clips_per_video, *frames.shape[1:]).transpose(0, 1).flatten(0, 1)
        if self.shuffle_frames:
            order = torch.from_numpy(draw_generator(self.seed, Kind.ORDER, index).permutation(self.n_frames))
            frames = frames.view(-1, self.n_frames, *frames.shape[1:])[:, order].flatten(0, 1)
        # (clips * T, C, H, W)
        return ClipItem(frames.permute(0, 3, 1, 2), label, epoch, index, 1.0, "", note)

    def unreadable(self, key: Key, reason: str) -> ClipItem:
        """Black frames of weight 0 for a video that cannot be read."""
        epoch, index = key
        size = self.n_frames * self.clips_per_video, 3, self.short_side, self.short_side
        black = torch.zeros(size, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        return ClipItem(black, self._numbers[self.videos[index].label], epoch, index, 0.0, reason)

    def _read(self, epoch: int, index: int) -> Clip[Frames]:
        video, choice = self.videos[index], self._choice(epoch, index)
        if self.store is not None:
            return self.store.read(video.name, choice, short_side=self.short_side)
        known = self._known.get(index)
        return read_clip(
            video.source, choice, short_side=self.short_side, known=known, time_limit=self.time_limit
        )

    def _choice(self, epoch: int, index: int) -> Choice:
        if (seconds := self.clip_seconds) is not None:
            places = clip_offsets(self.clips_per_video)
            if self.training:
                places = [draw_generator(self.seed, Kind.OFFSETS, epoch, index).random()]
            whole = not self.training

            def by_time(times: Times) -> list[int]:
                clips = [dense_indices(times, self.n_frames, seconds, p, whole_steps=whole) for p in places]
                return [index for clip in clips for index in clip]

            return ByTime(by_time)
        if self.training:
            offsets = [draw_generator(self.seed, Kind.OFFSETS, epoch, index).random(self.n_frames).tolist()]
        else:
            offsets = [[offset] * self.n_frames for offset in clip_offsets(self.clips_per_video)]

        def choose(frame_count: int) -> list[int]:
            clips = [segment_indices(frame_count, self.n_frames, o, grid=self.grid) for o in offsets]
            return [index for segment in zip(*clips, strict=True) for index in segment]  # ascending

        return choose


def collate(items: Sequence[ClipItem]) -> ClipBatch:
    """Batches clips without stacking them: videos differ in size until they are transformed."""
    return ClipBatch(
        clips=[item.frames for item in items],
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        epochs=torch.tensor([item.epoch for item in items], dtype=torch.int64),
        indices=torch.tensor([item.index for item in items], dtype=torch.int64),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        errors=[(item.index, item.error) for item in items if item.error],
        notes=[(item.index, item.note) for item in items if item.note],
    )


def load_batches(
    dataset: ClipDataset,
    batches: Iterable[Sequence[Key]],
    *,
    workers: int,
    pin_memory: bool = False,
    survives: bool = False,
) -> Generator[ClipBatch, None, None]:
    """Clips by their keys, batch by batch, in order; 0 workers read on demand in this process.

    The clips do not depend on the number of workers. See Note [Threads for frame stores]. With `survives`, a video
    whose process dies is unreadable; else the death is an error.

    Raises DataError if a frame store cannot be read; see `worker_errors` for processes that die.
    """
    global _is_waiting
    made = (_read(dataset, pin_memory, keys) for keys in batches)
    if workers:
        start = _by_threads
        if dataset.store is None:
            start = _by_surviving_processes if survives else _by_processes
        made = start(dataset, batches, workers, pin_memory)
    with closing(made):
        while True:
            _is_waiting = True
            try:
                batch = next(made, None)
            finally:
                _is_waiting = False
            if batch is None:
                return
            yield batch


def is_waiting() -> bool:
    """Whether this process waits for a batch."""
    return _is_waiting


@contextmanager
def worker_errors(*, resumes: bool = False) -> Iterator[None]:
    """Turns the death or failure of a decoding process within the block, or function, into a RunError.

    `resumes`: the command can resume from a checkpoint. torch raises a death when its signal arrives, anywhere
    in the main process.
    """
    try:
        yield
    except TvitError:
        raise
    except Exception as error:
        text = str(error)
        if "DataLoader worker" not in text:
            raise
        failed = text.startswith("Caught ")  # an exception in a worker, with its traceback
        reason = text.strip().splitlines()[-1] if failed else text
        raise RunError(
            f"A process that decodes videos {'failed' if failed else 'died'}: {reason.rstrip('.')}. "
            "If memory or shared memory ran out: fewer --num-workers (0 decodes in this process), a frame store "
            "(tvit extract), or in a container more shared memory (docker run --shm-size 2g)."
            f"{' A training resumes from its last checkpoint with --resume-from-checkpoint latest.' * resumes}"
        ) from error


def _read(dataset: ClipDataset, pin_memory: bool, keys: Sequence[Key]) -> ClipBatch:
    batch = collate([dataset[key] for key in keys])
    return batch.pin_memory() if pin_memory else batch


def _by_threads(
    dataset: ClipDataset, batches: Iterable[Sequence[Key]], workers: int, pin_memory: bool
) -> Generator[ClipBatch, None, None]:
    # Page-locked memory belongs to a device, and a new thread starts with the first.
    begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
    pool = ThreadPoolExecutor(workers, "clips", initializer=begin)
    keys_left = iter(batches)
    begun: deque[Future[ClipBatch]] = deque()  # two per worker, as in torch's DataLoader
    try:
        while True:
            while len(begun) < 2 * workers and (keys := next(keys_left, None)) is not None:
                begun.append(pool.submit(_read, dataset, pin_memory, keys))
            if not begun:
                return
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _by_surviving_processes(
    dataset: ClipDataset, batches: Iterable[Sequence[Key]], workers: int, pin_memory: bool
) -> Generator[ClipBatch, None, None]:
    """`_by_processes`; if one dies, the videos of the batches begun are read by a process each."""
    left = iter(batches)
    begun: deque[Sequence[Key]] = deque()

    def drawn() -> Iterator[Sequence[Key]]:
        for keys in left:
            begun.append(keys)
            yield keys

    while True:
        try:
            with closing(_by_processes(dataset, drawn(), workers, pin_memory, survives=True)) as made:
                for batch in made:
                    begun.popleft()
                    yield batch
            return
        except RuntimeError as error:
            if not begun or not _is_death(error):
                raise
        while begun:
            batch = _join([_read_apart(dataset, key) for key in begun.popleft()])
            yield batch.pin_memory() if pin_memory else batch


def _is_death(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader worker")


def _read_apart(dataset: ClipDataset, key: Key) -> ClipBatch:
    """One clip, read by a process of its own; if that dies, its video is unreadable."""
    try:
        with closing(_by_processes(dataset, [[key]], 1, pin_memory=False)) as made:
            return next(made)
    except RuntimeError as error:
        if not _is_death(error):
            raise
        text = "the process that decodes it died. The file may be damaged, or the memory ran out."
        return collate([dataset.unreadable(key, text)])


def _join(batches: Sequence[ClipBatch]) -> ClipBatch:
    names = ("labels", "epochs", "indices", "weights")
    columns: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    clips, errors = [c for b in batches for c in b.clips], [e for b in batches for e in b.errors]
    return ClipBatch(clips=clips, errors=errors, notes=[n for b in batches for n in b.notes], **columns)


def _by_processes(
    dataset: ClipDataset,
    batches: Iterable[Sequence[Key]],
    workers: int,
    pin_memory: bool,
    *,
    survives: bool = False,
) -> Generator[ClipBatch, None, None]:
    folder = Path(tempfile.mkdtemp(prefix="tvit-"))
    loader: DataLoader[ClipItem] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # keys are (epoch, index), not numbers
        num_workers=workers,
        collate_fn=partial(_share, folder),
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else iterating draws from the global one
        multiprocessing_context=(context := _context()),
    )
    iterator: Any = None
    try:
        is_forked = context.get_start_method() == "fork"
        with later_interrupt(), nullcontext() if is_forked else hidden_main():
            iterator = iter(loader)
        # Without the signal, torch notices a death within seconds, while it waits for a batch.
        with _unsignalled_deaths() if survives else nullcontext():
            for batch in _received(iterator):
                yield batch.load() if isinstance(batch, _BatchFile) else batch
    finally:
        if iterator is not None:
            _end_workers(iterator)
        shutil.rmtree(folder, ignore_errors=True)


def _context() -> BaseContext:
    """How worker processes start. See Note [Workers are not forked]."""
    is_safe = not (torch.cuda.is_initialized() or (dist.is_available() and dist.is_initialized()))  # type: ignore[no-untyped-call]
    if is_safe or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not in each worker
    return context


@contextmanager
def hidden_main() -> Iterator[None]:
    """Hides the main script from processes that start within the block. See Note [Workers are not forked]."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def end_with_parent() -> None:
    """Ends this process when the one that started it has ended, which cannot stop workers once killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _received(iterator: Iterator[Any]) -> Iterator[Any]:
    """The batches of worker processes; one that dies while it hands over a batch is a death as any other."""
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"DataLoader worker ended while it sent a batch ({error})") from error


@dataclass(frozen=True)
class _BatchFile:
    path: Path

    def load(self) -> ClipBatch:
        """Reads the batch and removes its file."""
        batch: ClipBatch = torch.load(self.path, weights_only=False)
        self.path.unlink()
        return batch

    def pin_memory(self) -> ClipBatch:
        """The batch in page-locked memory; torch's DataLoader calls this by name."""
        return self.load().pin_memory()


def _share(folder: Path, items: Sequence[ClipItem]) -> ClipBatch | _BatchFile:
    """A worker's batch in shared memory or a file. See Note [Small shared memory]."""
    batch = collate(items)
    tensors = [*batch.clips, batch.labels, batch.epochs, batch.indices, batch.weights]
    if sum(tensor.untyped_storage().nbytes() for tensor in tensors) <= _free_shared_memory() / 2:
        try:
            for tensor in tensors:
                tensor.share_memory_()  # type: ignore[no-untyped-call]
            return batch
        except (OSError, RuntimeError):  # another worker was faster
            if not _SHARED_MEMORY.is_dir():
                raise
    descriptor, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        torch.save(batch, file)
    return _BatchFile(Path(name))


def _free_shared_memory() -> float:
    """Free bytes in /dev/shm; infinite on systems without it."""
    try:
        return float(shutil.disk_usage(_SHARED_MEMORY).free)
    except OSError:
        return float("inf")


@contextmanager
def later_interrupt() -> Iterator[None]:
    """Holds stop signals back while worker processes start, which do not ignore them yet."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # inherited by the workers
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back until the block ends, so that it is done as a whole or not at all."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    received: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {stop: signal.signal(stop, lambda number, frame: received.append(number)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    if received:
        signal.raise_signal(received[0])


def _begin_worker(worker: int) -> None:
    """Ignores stop signals, sends errors of the queue's thread to the parent, and prints none."""
    # Terminals and most schedulers signal the whole process group. The parent needs the worker to finish its step
    # and save.
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    end_with_parent()

    # A thread that shares tensors prints a traceback if the parent has ended the connection.
    sys.excepthook = lambda *error: None

    def send(queue: Any, error: Exception, entry: tuple[int, object]) -> None:
        number, data = entry
        if isinstance(data, ExceptionWrapper):  # the error itself cannot be sent
            os._exit(1)
        raised, where = (type(error), error, error.__traceback__), f"in DataLoader worker process {worker}"
        queue.put((number, ExceptionWrapper(raised, where)))  # type: ignore[no-untyped-call]

    multiprocessing.queues.Queue._on_queue_feeder_error = send  # type: ignore[attr-defined]


def _end_workers(iterator: Any) -> None:
    """Ends the processes of a DataLoader's iterator, and kills the rest after a time: they ignore SIGTERM."""
    workers = list(getattr(iterator, "_workers", ()))

    def kill() -> None:
        for worker in workers:
            worker.kill()

    timer = threading.Timer(_SECONDS_TO_END, kill)
    timer.daemon = True
    timer.start()
    with _unsignalled_deaths():
        try:
            iterator._shutdown_workers()
        finally:
            timer.cancel()
            kill()


@contextmanager
def _unsignalled_deaths() -> Iterator[None]:
    """Keeps torch from raising the end of a worker in the code that runs in the main thread."""
    is_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGCHLD, before)
