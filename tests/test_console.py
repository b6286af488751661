"""What people see: tables, sizes, plain lines where there is no terminal."""

from __future__ import annotations

import pytest

from tvit_cli.console import Console, size
from tvit_cli.engine.events import EpochDone, Note, Progress

LONG = "a/" * 80 + "clip.avi"


def test_sizes_read_as_people_write_them() -> None:
    assert [size(n) for n in (0, 999, 1500, 6_960_400_115, None)] == ["0 B", "999 B", "1.5 kB", "7.0 GB", "?"]


def test_without_a_terminal_a_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(["video", "score"], [(LONG, "0.5"), ("b", "10")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith(LONG)


def test_numbers_are_right_aligned_and_words_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(["a", "n", "w"], [("x", "1", "yes"), ("y", "100", "no")])
    rows = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert rows[1].index("1") > rows[2].index("1")
    assert rows[1].index("yes") == rows[2].index("no")


def test_markup_in_names_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(["video"], [("[red]clip[/red].avi",)])
    Console().warn("[bold]x")
    captured = capsys.readouterr()
    assert "[red]clip[/red].avi" in captured.out and "[bold]x" in captured.err


def test_quiet_keeps_warnings_and_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Console("quiet") as console:
        console.report(Note("info"))
        console.report(Progress("work", 1, 2))
        facts = {"seconds": 1.0, "clips_per_second": 9.0, "data_wait": 0.1}
        console.report(EpochDone(1, {"train_loss": 1.0, "train_clip_top1": 0.5, **facts}))
        console.report(Note("careful", "warning"))
        console.say("result")
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert captured.err == "warning: careful\n"


def test_details_are_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for verbosity in ("normal", "verbose"):
        Console(verbosity).report(Note("detail", "detail"))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "detail\n"
