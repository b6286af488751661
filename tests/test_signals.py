"""Training runs killed or signalled at any point, and resumed to the same bits.

Six cells of tests/bench/kills.py run here; all of them, and random kills, when the benchmark is run.
"""

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from bench import kills
from bench.kills import FACTORS, IN_THE_SUITE, Bench, Plan, Wrong, compare, covering, plan_of
from entry import ROOT

from tvit_cli import cli
from tvit_cli.data.layout import Video
from tvit_cli.engine import dataset, launch, train
from tvit_cli.engine import train as train_module
from tvit_cli.engine.dataset import check_videos
from tvit_cli.engine.launch import ImmediateStop, StopSignals, lost_rank_errors
from tvit_cli.engine.train import loop
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.errors import Interrupted, RunError

ONE = Plan("one process", 1, 0, "videos", ())


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    return Bench(shared / "kills", may_mount=False, quick=True)


def test_kill_cells_cover_every_pair_of_values():
    cells = covering()
    every = {
        ((i, a), (j, b))
        for (i, one), (j, other) in itertools.combinations(enumerate(FACTORS.values()), 2)
        for a in one
        for b in other
    }
    assert set().union(*map(kills.pairs, cells)) == every
    assert len(cells) == len(set(cells)) >= 24
    assert set(IN_THE_SUITE) <= set(cells) and len(IN_THE_SUITE) == 6
    for place, values in enumerate(FACTORS.values()):
        assert {cell[place] for cell in IN_THE_SUITE} == set(values)


TWO_RANKS = ("SIGTERM", "step", 2, 0, "videos")


@pytest.mark.parametrize("cell", (*IN_THE_SUITE, TWO_RANKS), ids=lambda cell: "-".join(map(str, cell)))
def test_killed_at_a_point_and_resumed_it_ends_with_the_same_bits(bench, cell):
    kills.run_plan(bench, plan_of(cell))


def test_a_bit_that_is_another_is_found(bench, tmp_path):
    """The benchmark itself would see a difference of one bit in a weight, and of one digit in a metric."""
    whole = bench.undisturbed(ONE)
    for name in ("trainable.safetensors", "state.json"):
        copy = copied(whole, tmp_path / name)
        file = list_checkpoints(copy / "checkpoints")[-1] / name
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        with pytest.raises(Wrong, match=f"{name} differs"):
            compare(copy, whole)
    copy = copied(whole, tmp_path / "metrics")
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text.replace('"train_loss": 1', '"train_loss": 2', 1))
    with pytest.raises(Wrong, match="metrics"):
        compare(copy, whole)
    (copied(whole, tmp_path / "left") / ".model.writing").mkdir()
    with pytest.raises(Wrong, match="left behind"):
        compare(tmp_path / "left", whole)
    compare(copied(whole, tmp_path / "same"), whole)


def copied(run, to):
    subprocess.run(["cp", "-r", str(run), str(to)], check=True)
    return to


@pytest.fixture
def command(bench, tmp_path, capsys):
    """`command(*flags)` runs `tvit train` in this process: its exit code, and what it wrote to stderr."""

    def run(*flags):
        (tmp_path / "c.json").write_text(bench.settings(ONE, tmp_path / "runs", "mine").model_dump_json())
        with pytest.raises(SystemExit) as ended:
            cli.run(["train", "--config", str(tmp_path / "c.json"), *flags])
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def at_call(module, name, nth, act, monkeypatch):
    """Let the nth call of a module's function begin with an act of ours."""
    real, calls = getattr(module, name), itertools.count(1)

    def wrapped(*arguments, **keywords):
        if next(calls) == nth:
            act()
        return real(*arguments, **keywords)

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 75), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(
    command, monkeypatch, tmp_path, bench, name, code
):
    before = signal.getsignal(getattr(signal, name))
    at_call(loop, "update", 3, lambda: signal.raise_signal(getattr(signal, name)), monkeypatch)
    ended, errors = command()
    assert (ended, signal.getsignal(getattr(signal, name))) == (code, before)
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step-000003"
    assert (
        f"Stopped by {name.replace('SIGINT', 'Ctrl-C')} after step 3 of 24; all is saved. Resume with:"
        in errors
    )
    assert errors.rstrip().endswith(f"tvit train --resume-from-checkpoint {checkpoint}")
    again = " Ctrl-C again stops at once." if name == "SIGINT" else ""
    assert f"\nStopping after this step, with a checkpoint.{again}\n" in errors
    monkeypatch.undo()
    assert command("--resume-from-checkpoint", str(checkpoint))[0] == 0
    compare(tmp_path / "runs" / "mine", bench.undisturbed(ONE))


def test_ctrl_c_of_a_terminal_ends_a_training_with_workers_cleanly(bench, tmp_path):
    """A terminal signals the whole process group, loader workers included."""
    settings = bench.settings(ONE, tmp_path / "runs", "mine")
    changes = {"num_workers": 2, "epochs": 1000, "warmup_epochs": 0}
    (tmp_path / "c.json").write_text(settings.model_copy(update=changes).model_dump_json())
    leader, terminal = pty.openpty()
    command = [sys.executable, "-m", "tvit_cli", "train", "--config", str(tmp_path / "c.json")]
    shown, is_sent = b"", False
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}

    def own_terminal():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=own_terminal, env=environ
    ) as child:
        os.close(terminal)
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(leader, 65536):
                shown += data
                if b"epoch   1 " in shown and not is_sent:
                    os.write(leader, b"\x03")
                    is_sent = True
    os.close(leader)
    text = shown.decode()
    assert child.returncode == 130 and "Traceback" not in text and "Error" not in text, text
    assert text.count("Stopping after this step") == 1 == text.count("Stopped by Ctrl-C after step")


def test_a_second_sigint_leaves_at_once(command, monkeypatch, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the step went on")

    at_call(loop, "update", 3, twice, monkeypatch)
    ended, errors = command()
    assert ended == 130 and "all is saved" not in errors
    assert [p.name for p in list_checkpoints(tmp_path / "runs" / "mine" / "checkpoints")] == ["step-000002"]


@pytest.mark.parametrize(
    ("module", "function", "advice"),
    [
        (train, "open_dataset", "start again with the same command"),
        (train_module, "save_model", "All steps are done and saved. Resume with:"),
    ],
)
def test_signals_outside_the_steps_keep_their_exit_code(
    command, monkeypatch, bench, tmp_path, module, function, advice
):
    at_call(module, function, 1, lambda: signal.raise_signal(signal.SIGUSR1), monkeypatch)
    ended, errors = command()
    assert ended == 75
    assert f"Stopped by SIGUSR1. {'Nothing is lost; ' * ('again' in advice)}{advice}" in errors
    monkeypatch.undo()
    assert command()[0] == 0  # a named experiment is gone on with
    compare(tmp_path / "runs" / "mine", bench.undisturbed(ONE))


@pytest.mark.parametrize(("module", "function"), [(loop, "_validate"), (train_module, "save_model")])
def test_a_run_that_stopped_early_and_was_killed_takes_no_further_step(
    command, monkeypatch, tmp_path, module, function
):
    standstill = ("--patience", "1", "--learning-rate", "1e-12", "--lora-dropout", "0")
    nth = 2 if function == "_validate" else 1
    at_call(module, function, nth, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    ended, _ = command(*standstill)
    run = tmp_path / "runs" / "mine"
    before = kills.records(run)
    assert ended == 143 and before[-1]["step"] == 12 and not (run / "model").exists()
    assert (run / "report.html").exists()
    monkeypatch.undo()
    assert command(*standstill)[0] == 0
    assert kills.records(run) == before and (run / "model").exists()


def test_a_signal_after_the_last_step_is_not_swallowed():
    with pytest.raises(Interrupted, match="SIGTERM"), ImmediateStop("All is done."), StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"


def test_a_checkpoint_that_a_stop_finds_written_is_not_written_again(command, monkeypatch, tmp_path):
    """Between its removal and its return nothing would be there, and of one kept checkpoint all would be lost."""
    written = []
    real = loop.save_checkpoint

    def save(*arguments, **keywords):
        written.append(keywords["state"].step)
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    at_call(loop, "_validate", 1, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert command()[0] == 143
    assert written == [2, 4, 6]


def test_worker_death_within_a_step_is_a_plain_error(command, monkeypatch):
    def kill_a_worker():
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        time.sleep(60)  # torch raises as soon as it is told of the death

    at_call(loop, "update", 3, kill_a_worker, monkeypatch)
    ended, errors = command("--num-workers", "2")
    assert ended == 1 and "A process that decodes videos died" in errors
    assert "bug in tvit" not in errors


def test_ctrl_c_while_videos_are_checked_does_not_wait_for_the_rest(monkeypatch, tmp_path):
    decoded = []

    def slow(path):
        decoded.append(path)
        time.sleep(0.01)

    def stop(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "decode_first", slow)
    videos = [Video(tmp_path / str(i), str(i), "a", "train", None) for i in range(200)]
    with pytest.raises(KeyboardInterrupt):
        check_videos(videos, workers=2, progress=stop)
    assert len(decoded) < 20


def test_a_process_that_lost_the_others_says_so_and_calls_it_no_mistake(monkeypatch):
    monkeypatch.setattr("tvit_cli.engine.launch.SECONDS_TO_BE_ENDED", 0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match="Another process of this training has ended"), lost_rank_errors():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match="ours"), lost_rank_errors():
        raise RuntimeError("a mistake of ours")
    signal.signal(signal.SIGTERM, before)


def test_a_process_whose_launcher_was_killed_ends(tmp_path):
    """Else it trained on, unseen, and kept the run's folder busy."""
    worker = (
        "import time; from tvit_cli.engine.launch import exit_with_launcher;"
        "exit_with_launcher(); print('here', flush=True); time.sleep(60)"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    environ = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", launcher], env=environ, stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None and child.stdout.readline() == b"here\n"
    child.kill()
    ended = threading.Thread(target=child.stdout.read)  # the worker holds the other end
    ended.start()
    ended.join(20 * launch.SECONDS_BETWEEN_LOOKS)
    assert not ended.is_alive()
    child.wait()
    child.stdout.close()


def test_interrupted_processes_are_spoken_for_by_the_first(monkeypatch, capsys):
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            cli._fail(Interrupted("Stopped by SIGTERM.", exit_code=143), 143)
        assert capsys.readouterr().err.count("Stopped by SIGTERM") == said
        with pytest.raises(SystemExit):
            cli._fail(RunError("memory ran out"), 1)
        assert capsys.readouterr().err.count("memory ran out") == 1
