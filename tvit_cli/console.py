"""All terminal output: results on stdout, progress and warnings on stderr, from the main process only."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from tvit_cli.errors import RunError
from tvit_cli.results import EpochDone, Event, Note, Progress, StepDone, TrainingStarts

UNWRAPPED = 10_000  # columns
FRAMES_PER_SECOND = 2  # of a live display; each takes some milliseconds of a core that computes
SECONDS_BETWEEN_LINES = 60.0  # where there is no live display


def print_error(error: BaseException) -> None:
    """Show an error's message on stderr, its first line marked; one that all processes raise is shown once."""
    if isinstance(error, RunError) and error.by_all and not _is_main_process():
        return
    RichConsole(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/] {escape(str(error))}"
    )


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun and accelerate launch number the processes


def size(count: int | None) -> str:
    """Bytes as people read them. 6960400115 -> 7.0 GB"""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as people read them. 8130 -> 2 h 16 min"""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _count(count: int, unit: str) -> str:
    return size(count) if unit == "bytes" else f"{count:,}"


class _Bars(RichProgress):
    """Progress bars, and below them the facts of what is going on, in as much of a line as there is."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.tasks and self.facts:
            yield Text(self.facts, style="dim", overflow="ellipsis", no_wrap=True)


def read_list() -> list[str]:
    """The lines of stdin that are not empty."""
    return [line for text in sys.stdin if (line := text.rstrip("\r\n"))]


class Console:
    """Shows an engine's events while it works, and its results when it is done.

    A context manager: progress bars live inside it. Without a terminal, bars become a plain line a minute.
    """

    def __init__(self, verbosity: Verbosity = "normal") -> None:
        self._verbosity = verbosity
        self._speaks = _is_main_process()
        # A file or a pipe has no width: nothing in it is wrapped, so that it can be searched line by line.
        width = None if sys.stdout.isatty() else UNWRAPPED
        self._out = RichConsole(highlight=False, soft_wrap=True, width=width, quiet=not self._speaks)
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True, quiet=not self._speaks)
        self._is_live = self._err.is_terminal and verbosity != "quiet"
        self._bars = _Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
            refresh_per_second=FRAMES_PER_SECOND,
            disable=not self._is_live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Console:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def report(self, event: Event) -> None:
        """Show one event of an engine."""
        match event:
            case Note():
                self._note(event)
            case Progress():
                done = size(event.done) if event.unit == "bytes" else ""
                self._bar(event.what, event.done, event.total, done)
                of = "" if event.total is None else f" of {_count(event.total, event.unit)}"
                self._line(f"{event.what}: {_count(event.done, event.unit)}{of}")
            case TrainingStarts():
                for name, text in event.facts.items():
                    self._say(f"[dim]{name:>8}[/]  {escape(text)}")
                self._bar("training", event.first_step, event.epochs * event.steps_per_epoch)
            case StepDone():
                self._bars.facts = (
                    f"epoch {event.epoch} · loss {event.loss:.3f} · top-1 {event.clip_top1:.3f} · "
                    f"rate {event.learning_rate:.1e} · {event.clips_per_second:.3g} clips/s · "
                    f"{event.data_wait:.0%} waiting for data"
                )
                self._bar("training", event.step, None)
                self._line(f"step {event.step}, {self._bars.facts}")
            case EpochDone():
                self._epoch(event)

    def table(
        self, columns: Iterable[str], rows: Iterable[Iterable[object]], *, title: str | None = None
    ) -> None:
        """Print a table on stdout; columns of numbers are right-aligned."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        cells = [[str(cell) for cell in row] for row in rows]
        for number, column in enumerate(columns):
            are_numbers = all(not row[number] or row[number][0].isdigit() for row in cells)
            table.add_column(column, justify="right" if are_numbers else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(escape, row))
        self._out.print(table)

    def json_line(self, value: Mapping[str, object]) -> None:
        """Print one JSON object on a line of stdout."""
        if self._speaks:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")

    def csv(self, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        """Print a table as CSV on stdout."""
        if self._speaks:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)

    def say(self, text: str) -> None:
        """Print a line of the result on stdout."""
        self._out.print(escape(text))

    def warn(self, text: str) -> None:
        """Print a warning on stderr, however quiet the console is."""
        self._err.print(f"[yellow]warning:[/] {escape(text)}")

    def next_steps(self, path: Path, commands: Iterable[str]) -> None:
        """Say where something is, and what to type next."""
        if self._verbosity == "quiet":
            self._out.print(escape(str(path)))
            return
        self._out.print(f"The model is in [bold]{escape(str(path))}[/]. Next:")
        for command in commands:
            self._out.print(f"  [bold cyan]{escape(command)}[/]")

    def _note(self, note: Note) -> None:
        if note.level == "warning":
            self.warn(note.text)
        elif note.level == "info" or self._verbosity == "verbose":
            self._say(escape(note.text))

    def _say(self, markup: str) -> None:
        if self._verbosity != "quiet":
            self._err.print(markup)

    def _line(self, text: str) -> None:
        """A sign of life where there is no live display, now and then."""
        now = time.monotonic()
        if not self._is_live and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say(escape(text))

    def _bar(self, what: str, done: int, total: int | None, facts: str = "") -> None:
        if what not in self._tasks:
            # What was done before is no work of this process: from zero, it would make the time left too short.
            self._tasks[what] = self._bars.add_task(what, total=total, completed=done, facts=facts)
        task = self._tasks[what]
        self._bars.update(task, completed=done, facts=facts)
        if total is not None:
            self._bars.update(task, total=total)
            if done >= total:
                self._bars.remove_task(self._tasks.pop(what))

    def _epoch(self, event: EpochDone) -> None:
        m = event.metrics
        self._last_line = time.monotonic()
        text = f"epoch {event.epoch:>3}  loss {m['train_loss']:.3f}  top-1 {m['train_clip_top1']:.3f}"
        if "val_loss" in m:
            average = " of the average" if "ema_decay" in m else ""
            text += f"  │ val{average} loss {m['val_loss']:.3f}  top-1 {m['val_video_top1']:.3f}"
        text += f"  │ {m['clips_per_second']:.3g} clips/s, {m['seconds']:.1f} s"
        text += f", {m['data_wait']:.0%} waiting for data"
        self._say(escape(text) + ("  [bold green]best[/]" if event.is_best else ""))


Verbosity = Literal["quiet", "normal", "verbose"]
