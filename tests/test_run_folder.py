"""Run folders: names, locks, overwriting and old checkpoints."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import settings

from tvit_cli.engine.train import run_folder, set_up
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.engine.train.run_folder import next_name, run_lock
from tvit_cli.errors import RunError, SettingsError


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
    with pytest.raises(
        SettingsError, match=r"is finished\. Take another name .*or replace it with --overwrite"
    ):
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


def test_overwrite_refuses_foreign_folders_and_moved_checkpoints(trained, tmp_path):
    first = trained(experiment_name="mine", checkpoint_dir="kept")
    shutil.rmtree(first.model)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("a cat")
    other = trained(experiment_name="other")
    for path in (other.model, other.run / "checkpoints"):
        shutil.rmtree(path)  # for room; its report was kept
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor" / "settings.json").write_text('{"fontSize": 12}')
    for name in ("mine", "photos", "other", "editor"):
        with pytest.raises(
            SettingsError, match=rf"{name}.checkpoints holds no checkpoint\. Take another name"
        ):
            trained(experiment_name=name)
    assert list_checkpoints(first.run / "kept") and (tmp_path / "photos" / "cat.jpg").exists()
    assert (other.run / "report.html").exists() and (tmp_path / "editor" / "settings.json").exists()


def test_a_folder_that_another_training_is_busy_in_is_left_alone(trained):
    first = trained(experiment_name="mine", epochs=3)
    shutil.rmtree(first.model)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(first.run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match="another training is busy in it"):
        trained(experiment_name="mine", epochs=3)
    with (
        pytest.raises(RunError, match="another training has just taken this name"),
        run_lock(run_folder.Run(first.run, first.run / "checkpoints", None)),
    ):
        pass
    holder.communicate(b"")
    trained(experiment_name="mine", epochs=3)


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
