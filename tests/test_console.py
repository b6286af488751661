"""Terminal output: tables, sizes, plain lines without a terminal."""

import csv
import io
import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tvit_cli import console as module
from tvit_cli.console import Console, print_error
from tvit_cli.errors import Interrupted, RunError, size_text
from tvit_cli.files import csv_row
from tvit_cli.results import ClassTable, EpochDone, Note, Progress, StepDone, TrainingStarts

LONG = "a/" * 80 + "clip.avi"


def test_tables_are_plain_lines_with_numbers_right_and_names_verbatim(capsys):
    Console().table(["video", "score"], [(LONG, "0.5"), ("b", "10")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith(LONG)
    Console().table(["a", "n", "w"], [("x", "1", "yes"), ("y", "100", "no")])
    rows = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert rows[1].index("1") > rows[2].index("1")
    assert rows[1].index("yes") == rows[2].index("no")
    Console().table(["video"], [("[red]clip[/red].avi",)])
    Console().warn("[bold]x")
    captured = capsys.readouterr()
    assert "[red]clip[/red].avi" in captured.out and "[bold]x" in captured.err
    assert [size_text(n) for n in (0, 999, 1500, 6_960_400_115)] == [
        "0 bytes", "999 bytes", "1.5 kB", "6.96 GB",
    ]  # fmt: skip


def test_table_of_101_classes_shows_the_largest_and_smallest(capsys):
    rows = tuple((f"class{n:03}", n, 1, 2) for n in range(101))
    table = ClassTable(("class", "train", "val", "test"), rows, ("all", 5050, 101, 202))
    for verbosity, lines in (("normal", 11), ("verbose", 103), ("quiet", 0)):
        Console(verbosity).report(table)
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == lines and all(len(line) <= 80 for line in shown)
        if verbosity == "normal":
            words = [line.split()[0] for line in shown]
            assert words[1:6] == ["class100", "class099", "class098", "class097", "93"]
            assert words[-2:] == ["class000", "all"]


HOSTILE = "a\x1b]0;owned\x07\x1b[31m\x9b2J\x7f\r\u202eiva.avi"


def test_escape_sequences_in_names_never_reach_the_terminal(monkeypatch, capsys):
    with Console() as console:
        console.table([HOSTILE], [(HOSTILE, "two\nlines")])
        console.csv(["video"], (HOSTILE,))
        console.json_line({HOSTILE: HOSTILE})
        console.print(HOSTILE)
        console.next_steps(Path(HOSTILE), [HOSTILE])
        console.warn(HOSTILE)
        console.report(Note(HOSTILE))
        console.report(TrainingStarts({"data": HOSTILE}, 1, 1, 0))
        print_error(RunError(f"{HOSTILE}\nsecond line"))
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert r"a\x1b]0;owned\x07\x1b[31m\x9b2J\x7f\r\u202eiva.avi" in captured.err
    assert "\nsecond line" in captured.err
    assert r"two\nlines" in captured.out
    (line,) = [line for line in captured.out.splitlines() if line.startswith("{")]
    assert json.loads(line) == {HOSTILE: HOSTILE}
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console() as console:
        console.report(Progress(f"[red]{HOSTILE}", 1, 2))
        console._bars.refresh()
    assert r"[red]a\x1b]0;owned" in terminal.getvalue() and "\x9b" not in terminal.getvalue()


def test_names_in_csv_are_no_formulas_and_numbers_stay(capsys):
    names = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "-1.5e-05", "+2", "a=b", ""]
    shown = ["'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\t=1", "-1.5e-05", "+2", "a=b", ""]
    assert csv_row([*names, -0.5, 3]) == [*shown, -0.5, 3]
    Console().csv(["@", "score"], ("=a.avi", -0.5))
    assert list(csv.reader(capsys.readouterr().out.splitlines())) == [["'@", "score"], ["'=a.avi", "-0.5"]]


def test_quiet_keeps_warnings_and_results_only(capsys):
    with Console("quiet") as console:
        console.report(Note("info"))
        console.report(Progress("work", 1, 2))
        facts = {"seconds": 1.0, "clips_per_second": 9.0, "data_wait": 0.1}
        console.report(EpochDone(1, {"train_loss": 1.0, "train_clip_top1": 0.5, **facts}))
        console.report(Note("careful", "warning"))
        console.print("result")
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert captured.err == "warning: careful\n"


def test_details_are_shown_when_asked_for(capsys):
    for verbosity in ("normal", "verbose"):
        Console(verbosity).report(Note("detail", "detail"))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "detail\n"


STEP = StepDone(
    epoch=3, step=120, loss=1.2345, clip_top1=0.5, learning_rate=3e-4, clips_per_second=211.4, data_wait=0.07
)
FACTS = "epoch 3 · loss 1.234 · top-1 0.500 · 211 clips/s · 7% waiting for data · learning rate 3.0e-04"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def displayed(monkeypatch, *, columns, first_step=119):
    """The last picture of a live display in the middle of a training, without its colours."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console()
    with console:
        console.report(TrainingStarts({}, 10, 100, first_step))
        console.report(STEP)
        terminal.seek(0)
        terminal.truncate()
        console._bars.refresh()
        shown = terminal.getvalue()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown).strip("\n").split("\n")


def test_the_live_display_has_a_bar_the_time_left_and_facts_in_one_line(monkeypatch):
    bar, facts = displayed(monkeypatch, columns=100)
    assert bar.startswith("training") and "120/1000" in bar and "left" in bar
    assert facts.rstrip() == FACTS
    lines = displayed(monkeypatch, columns=80)
    assert len(lines) == 2 and all(len(line) <= 80 for line in lines)
    assert lines[1].rstrip() == FACTS[:79] + "…" and "waiting for data" in lines[1]


@pytest.mark.parametrize("seconds", [0.04, 99.96, 5940, 36060])
@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.99}])
def test_epoch_lines_fit_80_columns(capsys, seconds, more):
    facts = {"train_loss": 4.615, "train_clip_top1": 1.0, "val_loss": 4.615, "val_video_top1": 0.5, **more}
    throughput = {"seconds": seconds, "clips_per_second": 211.4, "data_wait": 0.07}
    Console().report(EpochDone(300, {**facts, **throughput}, is_best=True))
    line = capsys.readouterr().err.rstrip("\n")
    assert len(line) <= 80 and line.endswith((" s best", " min best"))


def test_an_interrupt_is_acknowledged_before_the_work_ends(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Console():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            assert capsys.readouterr().err == "Stopping…\n"
    assert signal.getsignal(signal.SIGINT) is before
    print_error(Interrupted("Stopped by Ctrl-C.", exit_code=130))
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


def test_a_resumed_run_does_not_count_earlier_steps_into_its_speed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Console() as console:
        now = [100.0]
        console._bars.get_time = lambda: now[0]
        console.report(TrainingStarts({}, 10, 100, 500))
        for step in (501, 502, 503):
            now[0] += 2
            console.report(StepDone(6, step, 1.0, 0.5, 1e-4, 9.0, 0.0))
        assert console._bars.tasks[0].time_remaining == pytest.approx(2 * (1000 - 503), rel=0.1)


def test_without_a_terminal_a_line_a_minute_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console()
    console._bars.get_time = lambda: now[0]
    for second in range(200):
        now[0] = float(second)
        console.report(STEP)
        console.report(Progress("checking videos", second, 1300))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0] == f"step 120, {FACTS}"
    now[0] = 300
    console.report(Progress("checking videos", 300, 1300))
    assert capsys.readouterr().err == "checking videos: 300 of 1,300, 18 min left\n"
    console._last_line = -60
    console.report(Progress("fetching", 5_000_000, 7_000_000_000, "bytes"))
    assert capsys.readouterr().err == "fetching: 5 MB of 7 GB\n"


def test_an_error_that_all_processes_raise_is_said_once(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        print_error(RunError("diverged", by_all=True))
    print_error(RunError("own"))
    assert capsys.readouterr().err == "error: diverged\nerror: own\n"


def test_the_second_run_of_a_series_has_a_display_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Console() as console:
        for step in (2, 1):
            console.report(TrainingStarts({}, 1, 2, 0))
            assert console._bars.facts == ""
            console.report(StepDone(1, step, 1.0, 0.5, 1e-4, 9.0, 0.0))
        (task,) = console._bars.tasks
        assert task.completed == 1 and not task.finished
