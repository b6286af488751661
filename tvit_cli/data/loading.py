"""Batches of clips, read ahead of their turn: by threads from a frame store, by processes from videos."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.data import DataLoader

from tvit_cli.data.clips import ClipBatch, ClipDataset, ClipItem, collate
from tvit_cli.data.sampling import Key
from tvit_cli.errors import RunError

# Note [A frame store is read by threads]
# A clip of 18 frames of 320x240 is 4 MB. Handed from process to process it costs the kernel a thousand fresh
# pages of shared memory, which take longer than decoding its JPEGs: 15 ms of processor time a clip with
# worker processes, 6 ms with threads (tests/bench/RESULTS.md). libjpeg-turbo, zlib and the file system let
# go of Python's lock while they work, so threads do run side by side, and no shared memory can run out.
# Videos stay with processes: FFmpeg may crash on a damaged file, which must not end a training.
_AHEAD = 2  # batches per worker that are begun before their turn, as torch's DataLoader has it


def load_batches(
    dataset: ClipDataset, batches: Iterable[Sequence[Key]], *, workers: int, pin_memory: bool = False
) -> Iterator[ClipBatch]:
    """The clips of these keys, batch by batch in their order; with 0 workers read when they are asked for.

    The clips do not depend on the number of workers. See Note [A frame store is read by threads].

    Raises DataError when a frame store cannot be read; see `explains_dead_workers` for processes that die.
    """
    if workers and dataset.store is None:
        return _by_processes(dataset, batches, workers, pin_memory)
    if workers:
        return _by_threads(dataset, batches, workers, pin_memory)
    return map(partial(_read, dataset, pin_memory), batches)


@contextmanager
def explains_dead_workers() -> Iterator[None]:
    """Within this block, or function, the death of a process that decodes videos is a RunError.

    torch raises it as soon as the signal arrives, wherever the process is then: in a step as well as in its loader.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"A process that decodes videos died: {error}. If memory ran out, take fewer --num-workers. "
            "A training goes on from its last checkpoint with --resume-from-checkpoint latest."
        ) from error


def _read(dataset: ClipDataset, pin_memory: bool, keys: Sequence[Key]) -> ClipBatch:
    batch = collate([dataset[key] for key in keys])
    return batch.pin_memory() if pin_memory else batch


def _by_threads(
    dataset: ClipDataset, batches: Iterable[Sequence[Key]], workers: int, pin_memory: bool
) -> Iterator[ClipBatch]:
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
) -> Iterator[ClipBatch]:
    loader: DataLoader[ClipItem] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # keys are (epoch, index), not numbers
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else iterating draws from the global one
    )
    yield from loader


def _ignore_stop_signals(worker: int) -> None:
    """Leaves stopping to the parent, since a terminal and most queues signal the whole process group.

    The parent finishes its step and saves, for which it needs the worker; when it is gone, torch ends the
    worker.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
