"""All terminal output: results on stdout, progress and warnings on stderr, of the main process only."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich import progress
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tvit_cli.errors import Interrupted, RunError, size_text
from tvit_cli.files import csv_row

if TYPE_CHECKING:
    from tvit_cli.results import EpochDone, Event, Report

MOST_CLASSES = 16  # in the table of classes before a training; of more, a quarter at either end

T = TypeVar("T")
R = TypeVar("R")

# Control characters, which a terminal obeys, except tab and line feed; and those that reverse the order of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _printable(text: str) -> str:
    r"""Text with its control characters as escapes. An escape character -> \x1b"""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _shown(text: str) -> str:
    """Printable text in which rich finds no markup."""
    return escape(_printable(text))


def _cells(row: Iterable[object]) -> list[str]:
    """The cells of a table's row as rich shows them, each on one line."""
    return [_shown(str(cell).replace("\n", r"\n")) for cell in row]


def _justify(cells: Iterable[str]) -> Literal["left", "right"]:
    """The side to which a column is aligned: numbers, and no other texts, to the right."""
    return "right" if all(cell[:1].isdigit() or not cell for cell in cells) else "left"


def print_error(error: BaseException) -> None:
    """Prints an error's message on stderr; one that all processes raise is printed by the main process only."""
    if isinstance(error, RunError) and error.by_all and not is_main_process():
        return
    console = RichConsole(stderr=True, highlight=False, soft_wrap=True)
    start = "" if isinstance(error, Interrupted) else "[bold red]error:[/] "
    console.print(f"{start}{_shown(str(error))}")


def is_main_process() -> bool:
    """Whether this is the process that prints."""
    return os.environ.get("RANK", "0") == "0"  # set by torchrun and accelerate launch


def duration(seconds: float) -> str:
    """A duration with its unit. 8130 -> 2 h 16 min"""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class _Bars(progress.Progress):
    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.tasks and self.facts:
            yield Text(self.facts, style="dim", overflow="ellipsis", no_wrap=True)


class Console:
    """Prints an engine's events and results.

    A context manager that shows progress bars; without a terminal it prints a plain line per minute instead.
    """

    def __init__(self, verbosity: Literal["quiet", "normal", "verbose"] = "normal") -> None:
        self._verbosity = verbosity
        self.is_verbose = verbosity == "verbose"
        self._is_main = is_main_process()
        # Lines in a file or pipe are not wrapped, so that they can be searched.
        width = None if sys.stdout.isatty() else 10_000
        self._out = RichConsole(highlight=False, soft_wrap=True, width=width, quiet=not self._is_main)
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True, quiet=not self._is_main)
        self._is_live = self._err.is_terminal and verbosity != "quiet"
        self._bars = _Bars(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(20),  # so that a line of 80 columns has room for everything
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[facts]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("[dim]left"),
            progress.TimeRemainingColumn(),
            console=self._err,
            transient=True,
            refresh_per_second=2,  # a refresh takes some milliseconds of a core that computes
            disable=not self._is_live,
            redirect_stdout=False,  # results go to stdout while bars are shown on stderr
        )
        self._tasks: dict[str, progress.TaskID] = {}
        self._last_line = time.monotonic()
        self._plan: dict[str, str] = {}
        self._before: Any = None  # handler of Ctrl-C
        self._begun = ""  # line of `write`

    def __enter__(self) -> Console:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Acknowledges Ctrl-C at once: processes that decode may take seconds to end."""
        with suppress(RuntimeError):  # a write to stderr was interrupted
            self._print_progress("Stopping…")
        raise KeyboardInterrupt

    def run(self, work: Callable[[T, Report], R], settings: T) -> R:
        """Result of an engine function; its progress is shown meanwhile."""
        with self:
            return work(settings, self.report)

    def report(self, event: Event) -> None:
        """Prints one event of an engine."""
        from tvit_cli.results import (  # 10 ms at start-up
            ClassTable,
            EpochDone,
            Note,
            Progress,
            StepDone,
            TrainingStarts,
        )

        match event:
            case Note(level="warning"):
                self.warn(event.text)
            case Note():
                if event.level == "info" or self.is_verbose:
                    self._print_progress(_shown(event.text))
            case Progress():
                text = size_text if event.unit == "bytes" else "{:,}".format
                done, total = text(event.done), "" if event.total is None else f" of {text(event.total)}"
                self._line(f"{event.task}: {done}{total}", event.task)
                self._bar(event.task, event.done, event.total, done if event.unit == "bytes" else "")
            case ClassTable():
                self.table(event.columns, [*self._some(event.rows), event.total], on_stderr=True)
            case TrainingStarts():
                for name, fact in event.facts.items():
                    if self._plan.get(name) == fact:  # as in the series' run before
                        continue
                    self._print_progress(f"[dim]{name:>8}[/]  {_shown(fact)}")
                self._plan = event.facts
                if (earlier := self._tasks.pop("training", None)) is not None:
                    self._bars.remove_task(earlier)
                self._bars.facts = ""
                self._bar("training", event.first_step, event.epochs * event.steps_per_epoch)
            case StepDone():
                self._bars.facts = (
                    f"epoch {event.epoch} · loss {event.loss:.3f} · top-1 {event.clip_top1:.3f} · "
                    f"{event.clips_per_second:.3g} clips/s · {event.data_wait:.0%} waiting for data · "
                    f"learning rate {event.learning_rate:.1e}"
                )
                self._bar("training", event.step, None)
                self._line(f"step {event.step}, {self._bars.facts}", "training")
            case EpochDone():
                self._epoch(event)

    def table(
        self, columns: Iterable[str], rows: Iterable[Iterable[object]], *, on_stderr: bool = False
    ) -> None:
        """Prints a table on stdout, or on stderr unless quiet; columns of numbers are right-aligned."""
        cells = [_cells(row) for row in rows]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            table.add_column(_shown(column), justify=_justify(row[number] for row in cells), overflow="fold")
        for row in cells:
            table.add_row(*row)
        if on_stderr:
            self._print_progress(table)
        else:
            with self._results():
                self._out.print(table)

    def growing_table(self, columns: Mapping[str, Sequence[str]]) -> Callable[[Iterable[object]], None]:
        """Prints a table row by row as the returned function is called; columns fit the texts given for each."""
        widths = [max(map(cell_len, map(_printable, (name, *texts)))) for name, texts in columns.items()]
        too_wide = sum(widths) + 2 * (len(widths) - 1) - self._out.width
        widths[0] = max(widths[0] - max(0, too_wide), 10)
        heads = list(columns)

        def print_row(row: Iterable[object]) -> None:
            cells = [str(cell) for cell in row]
            widths[1:] = map(max, widths[1:], [cell_len(_printable(cell)) for cell in cells[1:]])
            table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(heads))
            for width, (name, texts) in zip(widths, columns.items(), strict=True):
                table.add_column(_shown(name), justify=_justify(texts), overflow="fold", width=width)
            table.add_row(*_cells(cells))
            heads.clear()
            with self._results():
                self._out.print(table)

        return print_row

    def json_line(self, value: Mapping[str, object]) -> None:
        """Prints one JSON object on a line of stdout."""
        self.write(self.json_text(value) + "\n")

    @staticmethod
    def json_text(value: Mapping[str, object]) -> str:
        """A JSON object with its control characters as escapes."""
        text = json.dumps(value, ensure_ascii=False)
        return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

    def write(self, text: str) -> None:
        """Prints text on stdout as it is; on a terminal, where bars are shown, whole lines only."""
        self._begun += text
        if self._is_main and (text.endswith("\n") or not sys.stdout.isatty()):
            with self._results():
                sys.stdout.write(self._begun)
            self._begun = ""

    def csv(self, *rows: Iterable[object]) -> None:
        """Prints rows of CSV on stdout."""
        if self._is_main:
            with self._results():
                writer = csv.writer(sys.stdout, lineterminator="\n")
                for row in rows:
                    writer.writerow(
                        csv_row(_printable(cell) if isinstance(cell, str) else cell for cell in row)
                    )

    def print(self, text: str) -> None:
        """Prints a line of the result on stdout."""
        with self._results():
            self._out.print(_shown(text))

    def warn(self, text: str) -> None:
        """Prints a warning on stderr at every verbosity."""
        self._err.print(f"[yellow]warning:[/] {_shown(text)}")

    def next_steps(self, path: Path, commands: Iterable[str]) -> None:
        """Prints the path of a model and the commands that use it; a quiet console prints the path only."""
        shown = [f"The model is in [bold]{_shown(str(path))}[/]. Next:"]
        shown += [f"  [bold cyan]{_shown(command)}[/]" for command in commands]
        self._out.print(_shown(str(path)) if self._verbosity == "quiet" else "\n".join(shown))

    def _some(self, rows: Sequence[tuple[str | int, ...]]) -> list[tuple[str | int, ...]]:
        """The rows of a class table that are printed: of many classes, the largest and the smallest."""
        if len(rows) <= MOST_CLASSES or self.is_verbose:
            return list(rows)
        rows = sorted(rows, key=lambda row: -sum(n for n in row if isinstance(n, int)))
        half = MOST_CLASSES // 4
        more = f"{len(rows) - 2 * half} more (--verbose)"
        return [*rows[:half], (more, *[""] * (len(rows[0]) - 1)), *rows[-half:]]

    @contextmanager
    def _results(self) -> Iterator[None]:
        """Clears the bars while a result is printed on the same terminal, and flushes it."""
        clears = self._is_live and self._bars.live.is_started and sys.stdout.isatty()
        if clears:
            self._bars.stop()
        try:
            yield
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough
            self._out.on_broken_pipe()
        if clears:
            self._bars.start()

    def _print_progress(self, markup: RenderableType) -> None:
        if self._verbosity != "quiet":
            self._err.print(markup)

    def _line(self, text: str, name: str) -> None:
        now = time.monotonic()
        if not self._is_live and now - self._last_line >= 60:
            self._last_line = now
            task = next((task for task in self._bars.tasks if task.id == self._tasks.get(name)), None)
            left = None if task is None else task.time_remaining
            self._print_progress(_shown(f"{text}, {duration(left)} left" if left else text))

    def _bar(self, name: str, done: int, total: int | None, facts: str = "") -> None:
        if name not in self._tasks:
            # Steps of an earlier process must not count into the speed, which predicts the time left.
            self._tasks[name] = self._bars.add_task(_shown(name), total=total, completed=done, facts=facts)
        task = self._tasks[name]
        self._bars.update(task, completed=done, facts=facts)
        if total is not None:
            self._bars.update(task, total=total)
            if done >= total:
                self._bars.remove_task(self._tasks.pop(name))

    def _epoch(self, event: EpochDone) -> None:
        m = event.metrics
        self._last_line = time.monotonic()
        # At most 80 columns; throughput and waiting for data are in the display, metrics.jsonl and the last line.
        text = f"epoch {event.epoch:>3} loss {m['train_loss']:.3f} top-1 {m['train_clip_top1']:.3f}"
        if "val_loss" in m:
            name = "EMA" if "ema_decay" in m else "val"  # averaged weights are validated
            text += f" │ {name} loss {m['val_loss']:.3f} top-1 {m['val_video_top1']:.3f}"
        text += f" │ {duration(round(m['seconds'], 1))}"
        self._print_progress(_shown(text) + (" [bold green]best[/]" if event.is_best else ""))
