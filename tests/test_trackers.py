"""Metrics files, Weights & Biases and TensorBoard, also after a resume."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
from entry import run_python
from tiny import SCRATCH, make_clips, make_pretrained, run, settings

from tvit_cli.engine.train import trackers as module
from tvit_cli.engine.train import train
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.engine.train.trackers import Trackers
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.results import Note, silent


def scalars(result):
    """TensorBoard's scalars of a run: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(result.run / "tensorboard"))
    log.Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_tensorboard_goes_on_in_the_same_log_without_a_step_twice(clips, tmp_path):
    facts = {
        "path_to_data": str(clips), "working_directory": tmp_path, "epochs": 3, "log_tensorboard": True,
        **SCRATCH,
    }  # fmt: skip
    first = run(**facts, experiment_name="mine")
    whole = scalars(first)
    records = [json.loads(line) for line in (first.run / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], r["val_loss"]) for r in records if r["kind"] == "epoch"]
    assert [step for step, _ in whole["epoch/val_loss"]] == [3, 6, 9]
    assert [value for _, value in whole["epoch/val_loss"]] == pytest.approx([value for _, value in losses])
    assert [step for step, _ in whole["step/train_loss"]] == list(range(1, 10))
    for path in list_checkpoints(first.run / "checkpoints")[1:]:  # stopped after the first epoch
        shutil.rmtree(path)
    shutil.rmtree(first.model)
    again = scalars(run(**facts, experiment_name="mine"))
    clocks = ("epoch/seconds", "epoch/clips_per_second", "epoch/data_wait")
    assert again.keys() == whole.keys()
    assert all([s for s, _ in again[tag]] == [s for s, _ in whole[tag]] for tag in whole)
    assert all(again[tag] == whole[tag] for tag in whole if tag not in clocks)


def test_without_tensorboard_the_extra_is_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'tvit\[tensorboard\]'"):
        run(path_to_data="nowhere", working_directory=tmp_path, log_tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_counts_its_classes_as_an_undisturbed_one(clips, tmp_path):
    facts = {"path_to_data": str(clips), "working_directory": tmp_path, "epochs": 3, **SCRATCH}
    first = run(**facts, experiment_name="mine")
    file = first.run / "val_per_class.jsonl"
    whole = file.read_bytes()
    assert len(whole.splitlines()) == 3
    for path in list_checkpoints(first.run / "checkpoints")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(first.model)
    with file.open("a") as end:
        end.write('{"step": 9, "cl')  # killed while it wrote
    again = run(**facts, experiment_name="mine")
    assert file.read_bytes() == whole
    assert again.report is not None
    page = again.report.read_text(encoding="utf-8")
    assert all(f"epoch {n}: val " in page for n in (1, 2, 3))


def test_counts_come_back_as_they_were_noted(tmp_path):
    trackers = Trackers(tmp_path)
    trackers.log_per_class(3, {"a": (4, 1)})
    trackers.log_per_class(6, {"a": (4, 2), "b": (1, 0)})
    assert trackers.per_class(6) == {"a": (4, 2), "b": (1, 0)} and trackers.per_class(9) == {}
    trackers.cut_after(5)
    assert trackers.per_class(6) == {} and trackers.per_class(3) == {"a": (4, 1)}
    assert Trackers(None).records("epoch") == [] and Trackers(None).per_class(3) == {}


@pytest.fixture
def nobody_is_logged_in(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("nobody_is_logged_in")
def test_wandb_without_login_is_offline_and_resumes_the_same_run(tmp_path, monkeypatch):
    asked = []
    real = socket.getaddrinfo

    def spy(host, *arguments, **keywords):
        asked.append(host)
        return real(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    events = []

    def go(**changes):
        facts = settings(
            path_to_data=str(tmp_path / "colours"), hf_model_name=str(tmp_path / "tiny-vit"),
            working_directory=tmp_path / "runs", log_wandb=True, **changes,
        )  # fmt: skip
        return train(facts, events.append)

    make_clips(tmp_path / "colours")
    make_pretrained(tmp_path / "tiny-vit")
    first = go()
    assert any("wandb login" in e.text and "wandb sync" in e.text for e in events if isinstance(e, Note))
    shutil.rmtree(first.model)
    shutil.rmtree(list_checkpoints(first.run / "checkpoints")[-1])
    go(resume_from_checkpoint="latest")
    own = (first.run / "wandb-id").read_text()
    kept = [path.name for path in (first.run / "wandb").glob("offline-run-*")]
    # offline-run-<time>-<id>, and -1 behind it for a second one in one second
    assert kept and {name.split("-")[3] for name in kept} == {own}
    assert not [host for host in asked if host not in ("localhost", "127.0.0.1")]


def test_a_record_that_cannot_be_written_names_the_file_and_the_way_on(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written.*--resume-from-checkpoint latest"):
        Trackers(tmp_path).log({"kind": "step", "step": 1})


def test_truncated_metrics_line_and_later_records_are_removed(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    Trackers(tmp_path).cut_after(3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
    Trackers(tmp_path).cut_after(1)
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_record_that_a_full_disk_cut_off_is_no_record(tmp_path):
    """The report of a run that ends so must not hide why it ended."""
    trackers = Trackers(tmp_path)
    trackers.log({"kind": "epoch", "step": 2, "val_loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "lo')
    assert trackers.records("epoch") == [{"kind": "epoch", "step": 2, "val_loss": 0.5}]
    assert trackers.records("step") == []


def test_wandb_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    def unreachable(**_):
        raise wandb.errors.CommError("Run initialization has timed out")

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(
        RunError, match=r"--log-wandb: W&B could not be reached .*timed out.* WANDB_MODE=offline"
    ):
        Trackers(tmp_path).open_wandb(name="mine", config={}, report=silent)


def test_steps_and_epochs_have_curves_of_their_own_in_wandb(tmp_path):
    logged = []
    trackers = Trackers(tmp_path)
    trackers._wandb = SimpleNamespace(log=lambda values, step: logged.append({**values, "at": step}))
    for kind, loss in (("step", 1.0), ("epoch", 2.0)):
        trackers.log({"kind": kind, "step": 3, "train_loss": loss})
    assert logged == [{"step/train_loss": 1.0, "at": 3}, {"epoch/train_loss": 2.0, "at": 3}]


def test_wandb_project_entity_group_and_tags_are_respected(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from tvit_cli.engine.train.trackers import Trackers\n"
        "trackers = Trackers(Path(sys.argv[1]))\n"
        "trackers.open_wandb(name='mine', config={}, report=print)\n"
        "run = trackers._wandb\n"
        "print(run.project, run.entity, run.group, *run.tags)\n"
        "trackers.close()\n"
    )
    own = {
        "WANDB_PROJECT": "gestures",
        "WANDB_ENTITY": "lab",
        "WANDB_RUN_GROUP": "night",
        "WANDB_TAGS": "a,b",
    }
    for variables, answer in ((own, "gestures lab night a b"), ({}, "tvit")):
        (tmp_path / answer).mkdir()
        ended = run_python("-c", code, tmp_path / answer, WANDB_MODE="offline", **variables)
        assert ended.code == 0 and ended.out.startswith(answer), ended
