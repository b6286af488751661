"""Clip data sets and batches: uint8 frames read ahead by threads or worker processes.

Letters: B clips, T frames, C channels, H W pixels.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video
from tvit_cli.data.randaugment import Kind, draw_generator
from tvit_cli.data.video import Clip, Frames, read_clip
from tvit_cli.errors import RunError, TvitError, VideoError
from tvit_cli.files import Location
from tvit_cli.portable.reading import Key, clip_offsets, indices_on_grid, segment_indices


@dataclass(frozen=True, slots=True)
class ClipItem:
    """One clip on its way to a batch; `weight` is 0 and `error` says why where the video cannot be read."""

    frames: Tensor  # uint8 (T, C, H, W), channels last in memory; of several clips, one after the other
    label: int
    epoch: int
    index: int
    weight: float
    error: str


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """Clips of one batch, each in the size that its video has."""

    clips: list[Tensor]  # B times uint8 (T, C, H, W)
    labels: Tensor  # int64 (B,)
    epochs: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,)
    weights: Tensor  # float32 (B,); 0 for a video that could not be read
    errors: list[tuple[int, str]]  # (index, reason) of those

    def pin_memory(self) -> ClipBatch:
        """The same batch in page-locked memory; torch's DataLoader calls this by name."""
        return ClipBatch(
            [clip.pin_memory() for clip in self.clips],
            self.labels.pin_memory(),
            self.epochs.pin_memory(),
            self.indices.pin_memory(),
            self.weights.pin_memory(),
            self.errors,
        )


class ClipDataset(Dataset[ClipItem]):
    """One clip per video under the key (epoch, index).

    In training, the frames are drawn within their segments from (seed, epoch, index) and nothing else, so a
    resumed run and any number of workers see the same clips. Otherwise `clips_per_video` clips are taken at
    even places within the segments (one: their centres) and handed over as one, one after the other.
    `shuffle_frames` destroys the order of time, the same way in every epoch: a diagnostic. A video that
    cannot be read becomes black frames of weight 0, so that every process keeps the same number of steps.

    Frames come from `store` where there is one, else from the videos. `grid` restricts both to the frames
    that a store of so many frames per video holds, so that both choose the very same; without it, the store
    gives the stored frames nearest to those that the video would give.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        labels: Sequence[str],
        *,
        n_frames: int,
        short_side: int,
        seed: int,
        training: bool,
        shuffle_frames: bool = False,
        threads: int = 1,
        store: FrameStore | None = None,
        grid: int | None = None,
        clips_per_video: int = 1,
    ) -> None:
        assert clips_per_video == 1 or not training
        position = {label: number for number, label in enumerate(labels)}
        self._paths: list[Location] = [video.url or video.path for video in videos]
        self.names = [video.name for video in videos]
        self._targets = [position[video.label] for video in videos]
        self._n_frames = n_frames
        self._short_side = short_side
        self._seed = seed
        self._training = training
        self._shuffle_frames = shuffle_frames
        self._threads = threads
        self.store = store
        self._grid = grid
        self._clips_per_video = clips_per_video
        self._frame_counts: dict[int, int] = {}  # exact, once a video was read; each worker learns its own

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: Key) -> ClipItem:
        epoch, index = key
        try:
            clip = self._read(epoch, index)
        except VideoError as error:
            n_frames = self._n_frames * self._clips_per_video
            black = torch.zeros(n_frames, self._short_side, self._short_side, 3, dtype=torch.uint8)
            reason = str(error).removeprefix(f"{self._paths[index]}: ")
            return ClipItem(black.permute(0, 3, 1, 2), self._targets[index], epoch, index, 0.0, reason)
        self._frame_counts[index] = clip.frame_count
        frames = torch.from_numpy(clip.frames)  # (T * clips, H, W, C): by segment, then by clip
        if self._clips_per_video > 1:
            frames = frames.view(-1, self._clips_per_video, *frames.shape[1:]).transpose(0, 1).flatten(0, 1)
        if self._shuffle_frames:
            order = draw_generator(self._seed, Kind.ORDER, index).permutation(self._n_frames)
            frames = frames.view(-1, self._n_frames, *frames.shape[1:])[:, torch.from_numpy(order)].flatten(
                0, 1
            )
        frames = frames.permute(0, 3, 1, 2)  # (clips * T, C, H, W)
        return ClipItem(frames, self._targets[index], epoch, index, 1.0, "")

    def _read(self, epoch: int, index: int) -> Clip[Frames]:
        if self._training:
            takes = [draw_generator(self._seed, Kind.OFFSETS, epoch, index).random(self._n_frames).tolist()]
        else:
            takes = [[place] * self._n_frames for place in clip_offsets(self._clips_per_video)]

        def choose(frame_count: int) -> list[int]:
            clips = [
                segment_indices(frame_count, self._n_frames, offsets)
                if self._grid is None
                else indices_on_grid(frame_count, self._n_frames, offsets, grid=self._grid)
                for offsets in takes
            ]
            return [index for segment in zip(*clips, strict=True) for index in segment]  # ascending

        if self.store is not None:
            return self.store.read(self.names[index], choose, short_side=self._short_side)
        return read_clip(
            self._paths[index],
            choose,
            short_side=self._short_side,
            frame_count=self._frame_counts.get(index),
            threads=self._threads,
        )


def collate(items: Sequence[ClipItem]) -> ClipBatch:
    """Batches clips without stacking them: videos differ in size until they are transformed."""
    return ClipBatch(
        clips=[item.frames for item in items],
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        epochs=torch.tensor([item.epoch for item in items], dtype=torch.int64),
        indices=torch.tensor([item.index for item in items], dtype=torch.int64),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        errors=[(item.index, item.error) for item in items if item.error],
    )


# Note [A frame store is read by threads]
# A clip of 18 frames of 320x240 is 4 MB. Handed from process to process it costs the kernel a thousand fresh
# pages of shared memory, which take longer than decoding its JPEGs: 15 ms of processor time a clip with
# worker processes, 6 ms with threads (docs/negative-results.md). libjpeg-turbo, zlib and the file system let
# go of Python's lock while they work, so threads do run side by side, and no shared memory can run out.
# Videos stay with processes: FFmpeg may crash on a damaged file, which must not end a training.
_AHEAD = 2  # batches per worker that are begun before their turn, as torch's DataLoader has it

# Note [Little shared memory]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~
# Docker gives a container 64 MB of /dev/shm, less than two workers read ahead. torch moves tensors there in a
# thread of the worker's queue, where an error is printed and lost: the main process then waits for ever. So a
# worker moves its batch itself, where an error is raised, and takes at most half of what is free, which leaves
# room for semaphores and for the other workers. A batch that does not fit becomes a temporary file. An error in
# the queue's thread is sent in the batch's place.
_SHARED_MEMORY = Path("/dev/shm")
_SECONDS_TO_END = 5  # given to worker processes that are no longer needed, before they are killed

_is_waiting = False


def load_batches(
    dataset: ClipDataset, batches: Iterable[Sequence[Key]], *, workers: int, pin_memory: bool = False
) -> Generator[ClipBatch, None, None]:
    """The clips of these keys, batch by batch in their order; with 0 workers read when they are asked for.

    The clips do not depend on the number of workers. See Note [A frame store is read by threads].

    Raises DataError when a frame store cannot be read; see `explains_dead_workers` for processes that die.
    """
    made: Generator[ClipBatch, None, None]
    if workers and dataset.store is None:
        made = _by_processes(dataset, batches, workers, pin_memory)
    elif workers:
        made = _by_threads(dataset, batches, workers, pin_memory)
    else:
        made = (_read(dataset, pin_memory, keys) for keys in batches)
    with closing(made):
        while (batch := _wait_for_next(made)) is not None:
            yield batch


def is_waiting() -> bool:
    """Whether this process waits for a batch."""
    return _is_waiting


def _wait_for_next(made: Iterator[ClipBatch]) -> ClipBatch | None:
    global _is_waiting
    _is_waiting = True
    try:
        return next(made, None)
    finally:
        _is_waiting = False


@contextmanager
def explains_dead_workers() -> Iterator[None]:
    """Within this block, or function, the death or failure of a process that decodes videos is a RunError.

    torch raises a death as soon as the signal arrives, wherever the process is then: in a step as well as in its
    loader.
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
            "(tvit extract), or in a container more shared memory (docker run --shm-size 2g). "
            "A training goes on from its last checkpoint with --resume-from-checkpoint latest."
        ) from error


def _read(dataset: ClipDataset, pin_memory: bool, keys: Sequence[Key]) -> ClipBatch:
    batch = collate([dataset[key] for key in keys])
    return batch.pin_memory() if pin_memory else batch


def _by_threads(
    dataset: ClipDataset, batches: Iterable[Sequence[Key]], workers: int, pin_memory: bool
) -> Generator[ClipBatch, None, None]:
    # Page-locked memory belongs to a device, and a new thread begins with the first.
    begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
    pool = ThreadPoolExecutor(workers, "clips", initializer=begin)
    waiting = iter(batches)
    begun: deque[Future[ClipBatch]] = deque()
    try:
        while True:
            while len(begun) < _AHEAD * workers and (keys := next(waiting, None)) is not None:
                begun.append(pool.submit(_read, dataset, pin_memory, keys))
            if not begun:
                return
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _by_processes(
    dataset: ClipDataset, batches: Iterable[Sequence[Key]], workers: int, pin_memory: bool
) -> Generator[ClipBatch, None, None]:
    folder = Path(tempfile.mkdtemp(prefix="tvit-"))
    loader: DataLoader[ClipItem] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # keys are (epoch, index), not numbers
        num_workers=workers,
        collate_fn=partial(_hand_over, folder),
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else iterating draws from the global one
    )
    loading: Any = None
    try:
        loading = iter(loader)
        for batch in loading:
            yield batch.load() if isinstance(batch, _Filed) else batch
    finally:
        if loading is not None:
            _end_workers(loading)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Filed:
    """A batch in a temporary file."""

    path: Path

    def load(self) -> ClipBatch:
        """The batch; its file is removed."""
        batch: ClipBatch = torch.load(self.path, weights_only=False)
        self.path.unlink()
        return batch

    def pin_memory(self) -> ClipBatch:
        """The batch in page-locked memory; torch's DataLoader calls this by name."""
        return self.load().pin_memory()


def _hand_over(folder: Path, items: Sequence[ClipItem]) -> ClipBatch | _Filed:
    """A worker's batch in shared memory, or in a file. See Note [Little shared memory]."""
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
    return _Filed(Path(name))


def _free_shared_memory() -> float:
    """Bytes that are free in /dev/shm; infinite where a system has no such folder."""
    try:
        return float(shutil.disk_usage(_SHARED_MEMORY).free)
    except OSError:
        return float("inf")


def _begin_worker(worker: int) -> None:
    """Leaves stopping to the parent, and sends it the errors of the queue's thread.

    A terminal and most queues signal the whole process group, and the parent finishes its step and saves, for
    which it needs the worker; when it is gone, torch ends the worker.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def send(queue: Any, error: Exception, entry: tuple[int, object]) -> None:
        number, data = entry
        if isinstance(data, ExceptionWrapper):  # not even that can be sent
            os._exit(1)
        raised = (type(error), error, error.__traceback__)
        where = f"in DataLoader worker process {worker}"
        queue.put((number, ExceptionWrapper(raised, where)))  # type: ignore[no-untyped-call]

    multiprocessing.queues.Queue._on_queue_feeder_error = send  # type: ignore[attr-defined]


def _end_workers(loading: Any) -> None:
    """Ends the processes of a DataLoader's iterator, and kills those that do not end: they ignore SIGTERM."""
    workers = list(getattr(loading, "_workers", ()))
    is_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None  # else torch raises their end

    def kill() -> None:
        for worker in workers:
            worker.kill()

    timer = threading.Timer(_SECONDS_TO_END, kill)
    timer.daemon = True
    timer.start()
    try:
        loading._shutdown_workers()
    finally:
        timer.cancel()
        kill()
        if is_main:
            signal.signal(signal.SIGCHLD, before)
