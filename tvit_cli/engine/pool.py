"""Work spread over processes that start fresh, with results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")

_AHEAD = (
    4  # jobs per worker that are begun before their turn: one long video does not keep the others waiting
)


def in_order(
    work: Callable[[J], R], jobs: Sequence[J], *, workers: int, crashed: Callable[[J], R]
) -> Iterator[R]:
    """`work(job)` of each job, in their order; with 0 workers in this process.

    `work` is an importable function. A job that takes its process down with it (a decoder that crashes, a
    picture that no memory holds) gives `crashed(job)`, and the others go on.
    """
    if workers == 0:
        yield from map(work, jobs)
        return
    waiting = deque(jobs)
    begun: deque[tuple[J, Future[R]]] = deque()
    pool = _pool(min(workers, len(jobs)))
    try:
        while waiting or begun:
            while waiting and len(begun) < _AHEAD * workers:
                begun.append((waiting[0], _submit(pool, work, waiting.popleft())))
            job, future = begun.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # Nobody knows whose fault it was, so each job in flight is tried in a process of its own.
                pool.shutdown()
                for suspect in (job, *(other for other, _ in begun)):
                    yield _alone(work, suspect, crashed)
                begun.clear()
                pool = _pool(min(workers, max(1, len(waiting))))
            else:
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, work: Callable[[J], R], job: J) -> Future[R]:
    try:
        return pool.submit(work, job)
    except BrokenProcessPool as error:
        future: Future[R] = Future()
        future.set_exception(error)
        return future


def _alone(work: Callable[[J], R], job: J, crashed: Callable[[J], R]) -> R:
    with _pool(1) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            return crashed(job)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Fresh processes: a fork would copy the threads' locks of whatever this process has loaded.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(1, workers), mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: killed, it cannot tell its workers to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)
