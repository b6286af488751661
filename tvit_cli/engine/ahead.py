"""Work done ahead of whoever waits for it, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 0.1  # between two looks at whether anybody still wants the rest


def ahead(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The same items, made by a thread that is at most `depth` of them ahead.

    Whatever making them raises, is raised here. The thread ends with the last item, or when the caller stops.
    """
    made: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            put((None, error, True))
        else:
            put((None, None, True))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error, is_last = made.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item  # type: ignore[misc]  # T itself may be an optional type
    finally:
        stopped.set()
        thread.join()
