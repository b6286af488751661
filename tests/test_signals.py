"""Training runs ended by signals, and resumed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from entry import start
from tiny import last_weights, records, run_in, same, settings

from tvit_cli.data.clips import ClipDataset
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.errors import RunError


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_in_mid_epoch_and_resumed_it_ends_with_the_same_bits(
    trained, tmp_path, clips, pretrained, name
):
    changes = {"epochs": 40, "save_checkpoint_interval": 1, "max_no_of_checkpoints": 2}
    whole = trained(experiment_name="whole", **changes)
    facts = settings(
        path_to_data=str(clips),
        hf_model_name=str(pretrained),
        working_directory=tmp_path,
        **{**changes, "num_workers": 1},
    ).model_dump(mode="json")
    (tmp_path / "c.json").write_text(json.dumps(facts))
    checkpoints = tmp_path / "killed" / "checkpoints"
    child = start_config(tmp_path, "killed")
    deadline = time.monotonic() + 120
    while not list_checkpoints(checkpoints) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)
    os.killpg(child.pid, getattr(signal, name))  # as a terminal or a queue does: the loader's worker, too
    _, errors = child.communicate(timeout=60)
    assert child.returncode == {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[name], errors
    assert not (tmp_path / "killed" / "model").exists()
    assert (tmp_path / "killed" / "report.html").exists() == (name != "SIGKILL")
    if name != "SIGKILL":
        line = next(x for x in errors.splitlines() if "--resume-from-checkpoint" in x)
        assert Path(line.split()[-1]).parent == checkpoints
    again = start_config(tmp_path, "killed", "--resume-from-checkpoint", "latest")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    resumed = run_in(tmp_path / "killed")
    assert same(last_weights(resumed), last_weights(whole))
    assert records(resumed) == records(whole)
    assert records(resumed, "step") == records(whole, "step")


def test_a_decoding_process_that_dies_ends_the_run_with_one_sentence(trained, monkeypatch):
    def dies(self, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ClipDataset, "__getitem__", dies)
    with pytest.raises(RunError, match="A process that decodes videos died"):
        trained(num_workers=1)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_two_processes_that_are_killed_and_resumed_end_with_the_same_bits(tmp_path, clips, pretrained, name):
    changes = {"epochs": 60, "num_processes": 2, "max_no_of_checkpoints": 2, "val_groups": "none"}
    own = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, **changes
    )
    (tmp_path / "c.json").write_text(own.model_dump_json())
    whole = start_config(tmp_path, "whole")
    out, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0 and out.count("The model is in") == 1, errors
    checkpoints = tmp_path / "killed" / "checkpoints"
    child = start_config(tmp_path, "killed")
    deadline = time.monotonic() + 120
    while not list_checkpoints(checkpoints) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if name == "SIGKILL":  # one rank dies: the launcher ends the other, and says so
        ranks = [p for p in Path("/proc").iterdir() if p.name.isdigit() and is_rank(p, "1", tmp_path)]
        os.kill(int(ranks[0].name), signal.SIGKILL)
    else:
        child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=90)
    assert child.returncode == (1 if name == "SIGKILL" else 143), errors
    assert ("was killed (SIGKILL)" if name == "SIGKILL" else "all is saved") in errors
    assert "Traceback" not in errors
    again = start_config(tmp_path, "killed", "--resume-from-checkpoint", "latest")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    runs = [run_in(tmp_path / n) for n in ("whole", "killed")]
    assert same(*map(last_weights, runs))
    one, two = (records(run, "step") for run in runs)
    assert one == two


def start_config(folder: Path, name: str, *flags: str) -> subprocess.Popen[str]:
    """Start `tvit train` with the settings in `c.json` of a folder."""
    words = ("train", "--config", folder / "c.json", "--experiment-name", name)
    return start("-m", "tvit_cli", *words, *flags)


def is_rank(process: Path, rank: str, folder: Path) -> bool:
    """Whether a process is that rank of a training whose configuration lies in a folder."""
    try:
        environ = (process / "environ").read_bytes().split(b"\0")
        words = (process / "cmdline").read_text()
    except OSError:
        return False
    return f"RANK={rank}".encode() in environ and str(folder) in words and "killed" in words
