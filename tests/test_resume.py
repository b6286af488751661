"""Run folders and resuming: names, locks, the same bits, refusals of other settings and data."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from entry import tvit
from tiny import MIXED, last_weights, records, same, settings

from tvit_cli.engine.launch import deterministic_algorithms
from tvit_cli.engine.train import checkpoint, loop, run_folder, set_up
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.fingerprint import check_fingerprint, check_ranks_agree
from tvit_cli.engine.train.run_folder import next_name, run_lock
from tvit_cli.engine.train.state import Loop
from tvit_cli.errors import CheckpointError, RunError, SettingsError
from tvit_cli.results import silent


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 3),
        ({**MIXED, "repeats": 2, "save_every_steps": 5}, 5),
        ({"lora_init": "pissa"}, 3),
        ({"lora_use_dora": True}, 3),
        ({"train": "last-1"}, 3),
    ],
    ids=["plain", "mixed, within an epoch", "pissa", "dora", "last-1"],
)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(trained, changes, kept):
    whole = trained(**changes)
    half = trained(**changes, num_workers=2)
    checkpoints = half.run / "checkpoints"
    for path in list_checkpoints(checkpoints):
        if path.name > f"step-{kept:06d}":
            shutil.rmtree(path)
    shutil.rmtree(half.model)
    again = trained(**changes, resume_from_checkpoint=str(checkpoints / f"step-{kept:06d}"))
    assert again.run == half.run
    assert same(last_weights(again), last_weights(whole))
    assert records(again) == records(whole)
    assert (again.model / "model.safetensors").read_bytes() == (
        whole.model / "model.safetensors"
    ).read_bytes()


def test_resuming_takes_the_runs_own_settings(mine, tmp_path):
    shutil.rmtree(mine.model)
    ended = tvit("train", "--resume-from-checkpoint", "latest", "--working-directory", tmp_path)
    assert ended.code == 0, ended.err
    assert (mine.model / "card.json").is_file()


def test_resume_refuses_changed_settings_and_shows_the_difference(trained, mine):
    path = str(mine.run / "checkpoints" / "step-000003")
    before = {name: (mine.run / name).read_bytes() for name in ("settings.json", "metrics.jsonl")}
    with pytest.raises(CheckpointError, match=r"--learning-rate: 0.01 -> 0.02"):
        trained(resume_from_checkpoint=path, learning_rate=0.02)
    assert before == {name: (mine.run / name).read_bytes() for name in before}
    trained(resume_from_checkpoint=path, num_workers=1, max_no_of_checkpoints=1)


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(trained, finished, mine):
    path = list_checkpoints(mine.run / "checkpoints")[0]
    state = json.loads((path / "state.json").read_text())
    del state["identity"]["label_smoothing"], state["identity"]["classifier_rate"]
    del state["sha256"]["state.json"]
    state["sha256"]["state.json"] = checkpoint._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    assert same(last_weights(trained(resume_from_checkpoint=str(path))), last_weights(finished))
    with pytest.raises(CheckpointError, match=r"--label-smoothing: 0.0 -> 0.1"):
        trained(label_smoothing=0.1, resume_from_checkpoint=str(path))
    with pytest.raises(CheckpointError, match=r"--classifier-rate: 1.0 -> 10.0"):
        trained(classifier_rate=10.0, resume_from_checkpoint=str(path))


def test_resuming_with_other_videos_is_refused(trained, clips, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    first = trained(path_to_data=str(data))
    old = next(data.glob("Red/*_g01_*"))
    old.rename(old.with_name("v_Red_g01_c09.avi"))  # as many as before, but not the same
    with pytest.raises(CheckpointError, match="training videos"):
        trained(path_to_data=str(data), resume_from_checkpoint=str(first.run / "checkpoints" / "step-000003"))


def test_a_run_that_was_moved_ends_with_the_same_bits_where_it_is_now(trained, finished, mine, tmp_path):
    file = mine.run / "settings.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint_dir": "saved"}))
    (mine.run / "checkpoints").rename(mine.run / "saved")
    moved = tmp_path / "else" / "where"
    moved.parent.mkdir()
    shutil.move(mine.run, moved)
    place = {"working_directory": moved.parent, "experiment_name": "where", "checkpoint_dir": "saved"}
    for how in ({"resume_from_checkpoint": str(moved / "saved" / "step-000003")}, place):
        shutil.rmtree(moved / "model")
        shutil.rmtree(moved / "saved" / "step-000006")
        result = trained(**{"resume_from_checkpoint": "latest", **how})
        assert result.run == moved and not mine.run.exists()
        models = [(run.model / "model.safetensors").read_bytes() for run in (result, finished)]
        assert models[0] == models[1]
        written = json.loads((moved / "settings.json").read_text())
        assert (written["experiment_name"], written["checkpoint_dir"]) == ("where", "saved")


def test_a_checkpoint_under_another_name_is_resumed(trained, mine):
    good = mine.run / "checkpoints" / "step-000003"
    copy = shutil.copytree(good, good.with_name("good"))
    again = trained(resume_from_checkpoint=str(copy))
    assert [r["step"] for r in records(again)] == [3, 6]


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_survives(trained, finished, monkeypatch):
    real = checkpoint._write

    def write(path, data):
        if "step-000006" in str(path):
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(RunError, match=r"the disk is full\. step-000003 is still whole"):
        trained(experiment_name="full")
    monkeypatch.undo()
    result = trained(experiment_name="full", resume_from_checkpoint="latest")
    assert same(last_weights(result), last_weights(finished))


def test_a_named_experiment_that_is_not_finished_is_gone_on_with(trained, finished, mine):
    shutil.rmtree(list_checkpoints(mine.run / "checkpoints")[-1])
    shutil.rmtree(mine.model)
    again = trained(experiment_name="mine")
    assert same(last_weights(again), last_weights(finished)) and again.run == mine.run
    for name in ("model", "checkpoints", "plots"):
        shutil.rmtree(again.run / name)
    (again.run / "report.html").unlink()
    (again.run / "checkpoints" / ".step-000003.writing").mkdir(parents=True)  # killed in its first checkpoint
    anew = trained(experiment_name="mine")
    assert same(last_weights(anew), last_weights(finished)) and len(records(anew)) == 2


def test_finished_run_without_test_scores_is_scored_on_resume(trained):
    facts = {"experiment_name": "mine", "epochs": 2, "test_at_end": True, "test_groups": "03"}
    first = trained(**facts)
    assert first.test is not None
    shutil.rmtree(first.run / "eval")  # killed while it scored
    again = trained(**facts)
    assert again.test is not None and again.test.metrics == first.test.metrics and len(records(again)) == 2
    with pytest.raises(SettingsError, match="is finished"):
        trained(**facts)


def test_run_of_several_processes_resumes_with_its_own_number(trained, tmp_path, monkeypatch):
    own = trained(experiment_name="mine", num_processes=2)
    last = list_checkpoints(own.run / "checkpoints")[-1]
    started = []
    monkeypatch.setattr(
        "tvit_cli.engine.launch.run_local_processes", lambda count, *rest, **more: started.append(count) or 0
    )
    assert tvit("train", "--resume-from-checkpoint", last).code == 0
    assert tvit("train", "--resume-from-checkpoint", last, "--num-processes", 3).code == 0
    assert started == [2, 3]
    found = load_checkpoint(last).state.identity
    check_fingerprint({**found, "processes": 2}, found)
    with pytest.raises(CheckpointError, match="was trained on videos: move the frame store away"):
        check_fingerprint(found, {**found, "frames": "store, of 32 frames"})


def test_a_run_folder_is_resumed_with_its_settings_from_its_latest(mine, tmp_path):
    last = list_checkpoints(mine.run / "checkpoints")[-1]
    out = tvit("train", "--resume-from-checkpoint", last, "--show-settings").out
    shown = next(line for line in out.splitlines() if line.split()[:1] == ["learning_rate"])
    assert shown.split()[1] == "0.01" and "settings.json" in shown
    shutil.copytree(mine.run, tmp_path / "newer")
    shutil.rmtree(mine.model)
    ended = tvit("train", "--resume-from-checkpoint", mine.run)
    assert ended.code == 0, ended.err
    assert (mine.model / "card.json").is_file()
    shutil.rmtree(mine.run / "checkpoints")
    ended = tvit("train", "--resume-from-checkpoint", mine.run)
    assert ended.code == 2 and f"{mine.run / 'checkpoints'}: no checkpoint to resume from" in ended.err


def test_processes_that_see_different_videos_do_not_start():
    own = {"training videos": "12 (ab)", "frames": "videos"}
    check_ranks_agree([own, own])
    with pytest.raises(RunError, match=r"Process 1 differs from process 0 \(training videos\)"):
        check_ranks_agree([own, {**own, "training videos": "11 (cd)"}])


def test_two_trainings_never_share_a_folder(trained, monkeypatch):
    trained(experiment_name="colours-1")
    monkeypatch.setattr(run_folder, "next_name", lambda root, data: "colours-9")
    (trained(epochs=1).run / "settings.json").rename(trained(epochs=1, experiment_name="x").run / "kept.json")
    folder = run_folder.Run(trained(epochs=1, experiment_name="y").run, Path(), None)
    with pytest.raises(SettingsError, match="another training has just taken this name"):
        run_folder.write_settings(folder, settings(), is_alone=True)


def test_the_last_epoch_is_always_saved_and_old_checkpoints_go(trained):
    result = trained(epochs=5, save_checkpoint_interval=2, max_no_of_checkpoints=2)
    assert [p.name for p in list_checkpoints(result.run / "checkpoints")] == ["step-000012", "step-000015"]


def test_names_are_the_first_free_and_nothing_is_overwritten_unasked(trained, tmp_path):
    assert [trained(epochs=1).run.name for _ in range(2)] == ["colours-1", "colours-2"]
    shutil.rmtree(tmp_path / "colours-1")
    assert next_name(tmp_path, "colours") == "colours-3"
    said = r"is finished\. Take another name .*or replace it with --overwrite"
    with pytest.raises(SettingsError, match=said):
        trained(experiment_name="colours-2")


def test_unnamed_trainings_at_once_take_the_next_free_names(trained, tmp_path, monkeypatch):
    def overtaken(*arguments, **keywords):
        loop = set_up(*arguments, **keywords)
        for number in (1, 2):
            (tmp_path / f"colours-{number}").mkdir()
        return loop

    monkeypatch.setattr("tvit_cli.engine.train.set_up", overtaken)
    result = trained(epochs=1)
    assert result.run.name == "colours-3" and (result.run / "metrics.jsonl").is_file()
    assert json.loads((result.run / "settings.json").read_text())["experiment_name"] == "colours-3"
    assert not any((tmp_path / "colours-1").iterdir())


def test_overwrite_refuses_foreign_folders_and_moved_checkpoints(trained, mine, tmp_path):
    other = shutil.copytree(mine.run, tmp_path / "other")
    for name in ("model", "checkpoints"):
        shutil.rmtree(other / name)  # for room; its report was kept
    shutil.rmtree(mine.model)
    (mine.run / "checkpoints").rename(mine.run / "kept")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("a cat")
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor" / "settings.json").write_text('{"fontSize": 12}')
    for name in ("mine", "photos", "other", "editor"):
        said = rf"{name}.checkpoints holds no checkpoint\. Take another name"
        with pytest.raises(SettingsError, match=said):
            trained(experiment_name=name)
    assert list_checkpoints(mine.run / "kept") and (tmp_path / "photos" / "cat.jpg").exists()
    assert (other / "report.html").exists() and (tmp_path / "editor" / "settings.json").exists()


def test_a_folder_that_another_training_is_busy_in_is_left_alone(trained, mine):
    shutil.rmtree(mine.model)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(mine.run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match="another training is busy in it"):
        trained(experiment_name="mine")
    with (
        pytest.raises(RunError, match="another training has just taken this name"),
        run_lock(run_folder.Run(mine.run, mine.run / "checkpoints", None)),
    ):
        pass
    holder.communicate(b"")
    trained(experiment_name="mine")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_trained_on(trained, tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", none)
    assert trained(epochs=1).model.is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text(settings().model_dump_json())  # begun, or still busy
    with pytest.raises(SettingsError, match=r"there are no locks here .* Take another --experiment-name"):
        trained(experiment_name="mine", epochs=1)


def torch_modes():
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    modes = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), *modes


def before_update(monkeypatch, act):
    real = loop.update
    monkeypatch.setattr(loop, "update", lambda state: (act(), real(state))[1])


def test_deterministic_modes_hold_while_training_and_are_restored(trained, finished, monkeypatch):
    seen, before = [], torch_modes()
    before_update(monkeypatch, lambda: seen.append(torch_modes()))
    result = trained(deterministic=True)
    assert set(seen) == {(True, True, False, False)}
    assert torch_modes() == before and same(last_weights(result), last_weights(finished))


def test_an_operation_without_a_deterministic_form_is_named(trained, monkeypatch):
    before = torch_modes()
    before_update(monkeypatch, lambda: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)))
    said = r"--deterministic: PyTorch \S+ has no deterministic put_ on cpu\. Leave it out, or the option"
    with pytest.raises(RunError, match=said):
        trained(deterministic=True)
    assert torch_modes() == before
    trained(epochs=1)


def test_deterministic_sets_the_cublas_variable_before_cublas_starts(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(enabled=True, device="cpu"):
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with (
        pytest.raises(SettingsError, match=r"CUBLAS_WORKSPACE_CONFIG unset\. Set it to :4096:8 before"),
        deterministic_algorithms(enabled=True, device="cuda"),
    ):
        pass
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    for _ in range(2):  # runs of a series
        with deterministic_algorithms(enabled=True, device="cuda"):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)


def test_a_resume_on_a_gpu_keeps_the_deterministic_setting(inputs, tmp_path, monkeypatch):
    own = settings(
        **inputs, working_directory=tmp_path, deterministic=True, mixed_precision="no", device="cpu"
    )
    state = set_up(own, silent)
    assert "deterministic" not in state.fingerprint()
    monkeypatch.setattr(Loop, "device", torch.device("cuda"))
    now = state.fingerprint()
    with pytest.raises(CheckpointError, match="--deterministic: False -> True\n"):
        check_fingerprint({k: v for k, v in now.items() if k != "deterministic"}, now)
