"""Atomic writes; removal of files that tvit wrote, never through links."""

import errno
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import run, settings

from tvit_cli import cli, files
from tvit_cli.data.dataset_folder import DatasetFolder
from tvit_cli.data.framestore_writer import shard_paths
from tvit_cli.data.http import Download, fetch_files
from tvit_cli.data.layout import is_store
from tvit_cli.data.video_writer import video_writer
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.export import export
from tvit_cli.engine.predict import explain
from tvit_cli.engine.predict.timeline import write_timeline
from tvit_cli.engine.train.checkpoint import State, list_checkpoints, prune_checkpoints, save_checkpoint
from tvit_cli.engine.train.run_folder import why_not_replaced
from tvit_cli.engine.train.sweep import train_series
from tvit_cli.errors import DataError, RunError, SettingsError, shorten
from tvit_cli.files import atomic_write, disk_full_errors, files_below
from tvit_cli.model.folder import replace_folder
from tvit_cli.report.drawing import Drawing, to_png
from tvit_cli.report.html import write_pages
from tvit_cli.results import Segment, Timeline
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.export import ExportSettings


def test_a_file_is_put_in_its_place_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "new" / "out.csv"
    for text in ("old", "new"):
        with atomic_write(path) as beside:
            beside.write_text(text)
            assert beside.suffix == ".csv" and beside.name.startswith(".")
            assert path.exists() == (text == "new")
        assert path.read_text() == text and [*path.parent.iterdir()] == [path]


def test_a_disk_that_is_full_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "out.csv"
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(OSError, match="No space left"), atomic_write(path) as beside:
            beside.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_folders_that_cannot_be_made_and_full_disks_are_told_plainly(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"), atomic_write(tmp_path / "file" / "out.csv"):
        pass
    with (
        pytest.raises(RunError, match="; more space is needed"),
        disk_full_errors(tmp_path, purpose="fetching", need=lambda: -209711104),
    ):
        raise OSError(errno.ENOSPC, "No space left")


@pytest.fixture
def little_room():
    """No file may grow beyond 4 KiB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("little_room")
def test_a_timeline_that_a_disk_has_no_room_for_leaves_the_older_one(tmp_path):
    scores = np.full((1000, 2), 0.5)
    timeline = Timeline(
        video="long.mp4", labels=("a", "b"), seconds=100.0, window=1.0, stride=0.1, scores=scores,
        smoothed=scores, segments=(Segment(0.0, 100.0, "a", 0.5),),
        pictures=((1.0, np.zeros((9, 9, 3), np.uint8)),),
    )  # fmt: skip
    for name in ("timeline.csv", "timeline.png"):
        (tmp_path / name).write_text("old")
    with pytest.raises(RunError, match=r"--output .*: cannot be written \(File too large\)"):
        write_timeline(tmp_path, timeline)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old", "old"]


@pytest.mark.usefixtures("little_room")
def test_a_film_strip_that_a_disk_has_no_room_for_leaves_the_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "explanation_png", lambda *given: bytes(10_000))
    nothing = None
    path = tmp_path / "why.png"
    path.write_text("old")
    with pytest.raises(RunError, match=r"--explain .*why\.png: cannot be written \(File too large\)"):
        explain.write_explanation(path, nothing, nothing)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.usefixtures("little_room")
def test_a_video_that_a_disk_has_no_room_for_leaves_nothing(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(RunError, match="could not be written"), video_writer(tmp_path / "out.mp4") as writer:
        for number, picture in enumerate(pictures):
            writer.write(picture, number / 5, (number + 1) / 5)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def facts(inputs):
    return {**inputs, "epochs": 1}


@pytest.fixture(scope="module")
def whole(facts, tmp_path_factory):
    """A finished run with every kind of file that tvit leaves in one."""
    root = tmp_path_factory.mktemp("whole")
    result = run(
        **facts, working_directory=root, experiment_name="mine", checkpoint_dir="kept", test_at_end=True
    )
    evaluate(EvalSettings(model=result.model, subset="val", num_workers=0, device="cpu"))
    export(ExportSettings(model=result.model, format="safetensors"))
    folder = result.run
    (folder / "kept" / ".step-000099.writing").mkdir()
    (folder / "kept" / ".step-000099.writing" / "optimizer.safetensors").touch()
    for name in ("offline-run-1/logs/debug.log", "offline-run-1/run-1.wandb", "debug.log"):
        (folder / "wandb" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "wandb" / name).touch()
    (folder / "wandb" / "latest-run").symlink_to("offline-run-1")
    (folder / "wandb-id").touch()
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events.out.tfevents.1.host.2.0").touch()
    return folder


@pytest.fixture
def mine(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "runs" / "mine", symlinks=True))


def train_again(facts, folder, how, capsys):
    """Type `tvit train` for the experiment of that folder: with the flag, with a config, or without --overwrite."""
    config = folder.parent.with_suffix(".toml")
    config.write_text("overwrite = true\n")
    words = {"flag": ["--overwrite"], "config": ["--config", str(config)], "neither": []}[how]
    own = settings(**facts, working_directory=folder.parent, experiment_name=folder.name)
    for name in own.model_fields_set:
        words += [f"--{name.replace('_', '-')}", str(getattr(own, name))]
    with pytest.raises(SystemExit) as ended:
        cli.run(["train", *words])
    return int(ended.value.code or 0), " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("how", ["flag", "config"])
def test_overwrite_replaces_a_run_with_all_that_tvit_left(facts, mine, how, capsys):
    assert "or replace it with --overwrite." in train_again(facts, mine, "neither", capsys)[1]
    code, said = train_again(facts, mine, how, capsys)
    assert code == 0, said
    assert {p.name for p in mine.iterdir()} == {
        *("settings.json", ".lock", "metrics.jsonl", "val_per_class.jsonl", "report.html"),
        *("plots", "model", "checkpoints"),
    }
    assert list_checkpoints(mine / "checkpoints")


FOREIGN = (
    *("thesis.txt", "notes/thesis.txt", "kept/step-000003/thesis.txt", "kept/best.safetensors"),
    *("model/thesis.txt", "plots/thesis.png", "eval/test/thesis.csv", "export/safetensors/thesis.txt"),
    *("wandb/thesis.txt", "tensorboard/thesis.txt"),
)


def test_overwrite_refuses_a_run_with_a_foreign_file_by_name(facts, mine, capsys):
    before = files_below(mine)
    for name in FOREIGN:
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text("years of work")
        for how in ("flag", "config", "neither") if name in FOREIGN[:3] else ("flag",):
            code, said = train_again(facts, mine, how, capsys)
            assert code == 2 and files_below(mine) == sorted([*before, name]), (name, how)
            assert (mine / name).read_text() == "years of work"
            if how == "neither":
                assert "Take another name with --experiment-name." in said and "--overwrite" not in said
            else:
                assert f"holds files that tvit did not write: {name}" in said
        (mine / name).unlink()
        if not any((mine / name).parent.iterdir()):
            (mine / name).parent.rmdir()


@pytest.mark.parametrize("settings_file", [None, '{"fontSize": 12}', "[]", '"text"', "no json"])
def test_overwrite_refuses_a_folder_that_is_no_run(facts, tmp_path, settings_file, capsys):
    folder = tmp_path / "runs" / "thesis"
    (folder / "model").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "model/card.json", "z.txt"):
        (folder / name).write_text("years of work")
    if settings_file is not None:
        (folder / "settings.json").write_text(settings_file)
    before = files_below(folder)
    for how in ("flag", "neither") if settings_file else ("flag", "config", "neither"):
        code, said = train_again(facts, folder, how, capsys)
        assert code == 2 and files_below(folder) == before
        if how == "neither":
            assert "--overwrite" not in said and "--experiment-name" in said
        else:
            more = 1 if settings_file is None else 2
            assert f"a.txt, b.txt, model/card.json and {more} more" in said


@pytest.mark.parametrize("how", ["flag", "config"])
def test_overwrite_follows_no_link(facts, mine, tmp_path, how, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    before = files_below(mine)
    (mine.parent / "link").symlink_to(mine)
    code, said = train_again(facts, mine.parent / "link", how, capsys)
    assert code == 2 and "is a link" in said and files_below(mine) == before
    (mine / "photos").symlink_to(tmp_path / "photos")
    code, said = train_again(facts, mine, how, capsys)
    assert code == 2 and "did not write: photos" in said and (tmp_path / "photos" / "cat.jpg").is_file()


def test_a_run_begins_again_only_where_all_in_it_is_its_own(facts, mine):
    for name in ("model", "eval", "export", "plots", "kept"):
        shutil.rmtree(mine / name)
    (mine / "report.html").unlink()
    (mine / "notes").mkdir()
    (mine / "notes" / ".thesis.txt").write_text("hidden")
    said = r"holds no checkpoint\. Take another name with --experiment-name\.$"
    with pytest.raises(SettingsError, match=said):
        run(**facts, working_directory=mine.parent, experiment_name="mine")
    assert (mine / "notes" / ".thesis.txt").read_text() == "hidden"


def test_a_series_refuses_foreign_files_before_its_first_training(facts, mine, tmp_path):
    folder = tmp_path / "people"
    first, second = folder / "seed0-split1", folder / "seed1-split1"
    for target in (first, second):
        shutil.copytree(mine, target, symlinks=True)
    (second / "thesis.txt").touch()
    before = files_below(folder)
    own = {**facts, "working_directory": tmp_path, "experiment_name": "people"}
    with pytest.raises(SettingsError, match=r"seed1-split1 holds files that tvit did not write: thesis\.txt"):
        train_series([settings(seed=seed, overwrite=True, **own) for seed in (0, 1)])
    said = r"other settings(?s:.*)Take another name with --experiment-name\.$"
    with pytest.raises(SettingsError, match=said):
        train_series([settings(seed=seed, lora_rank=4, **own) for seed in (0, 1)])
    assert files_below(folder) == before
    assert "is not the folder of a run" in why_not_replaced(folder)  # a single run of the series' name


def save(folder, step):
    return save_checkpoint(folder, state=State(step=step), trainable={}, optimizer={}, best=None)


def test_checkpoints_that_go_leave_foreign_files_in_place(tmp_path):
    kept = [save(tmp_path, step) / "notes" / "thesis.txt" for step in (1, 2, 9)]
    for path in kept:
        path.parent.mkdir()
        path.write_text(path.parts[-3])
    for name in (".step-000001.writing", ".step-mine.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
        (tmp_path / name / "state.json").touch()
    save(tmp_path, 2)  # written again
    prune_checkpoints(tmp_path, keep=1, newest=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    assert [path.read_text() for path in kept] == ["step-000001", "step-000002", "step-000009"]
    assert files_below(tmp_path / ".step-000001.writing") == ["thesis.txt"]
    assert files_below(tmp_path / ".step-mine.writing") == ["state.json", "thesis.txt"]


def test_pruning_follows_no_link(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 1)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "step-000001").symlink_to(elsewhere)
    save(tmp_path / "here", 2)
    prune_checkpoints(tmp_path / "here", keep=1, newest=2)
    assert "state.json" in files_below(elsewhere)


def test_a_working_folder_with_a_foreign_file_keeps_it(tmp_path):
    work = tmp_path / ".model.writing"
    for name in ("thesis.txt", "old/thesis.txt", "old/card.json", "new/model.safetensors"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "card.json").touch()
    with replace_folder(tmp_path / "model") as new:
        (new / "card.json").write_text("new")
    assert files_below(tmp_path) == [".model.writing/thesis.txt", "model/card.json", "model/thesis.txt"]


def test_linked_working_folders_are_not_followed(tmp_path):
    (tmp_path / "thesis" / "new").mkdir(parents=True)
    (tmp_path / "thesis" / "new" / "thesis.txt").touch()
    (tmp_path / ".model.writing").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="exists"), replace_folder(tmp_path / "model"):
        pass
    assert files_below(tmp_path / "thesis") == ["new/thesis.txt"]
    (tmp_path / "elsewhere" / "videos").mkdir(parents=True)
    (tmp_path / "elsewhere" / "videos" / "cat.avi").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="link: is in the way"):
        files.remove_work(tmp_path / "link", DatasetFolder(tmp_path / "set", "mini").own)
    assert files_below(tmp_path / "elsewhere") == ["videos/cat.avi"]


def test_an_export_of_somebody_else_is_refused(mine, tmp_path):
    output = tmp_path / "other"
    output.mkdir()
    for content in ("[]", "text", json.dumps({"videos": 3})):
        (output / "parity.json").write_text(content)
        with pytest.raises(SettingsError, match=r"tvit did not write: parity\.json"):
            export(ExportSettings(model=mine, format="safetensors", output=output, overwrite=True))
    (tmp_path / "link").symlink_to(mine / "export" / "safetensors")
    with pytest.raises(SettingsError, match="is a link"):
        export(ExportSettings(model=mine, format="safetensors", output=tmp_path / "link", overwrite=True))
    assert (mine / "export" / "safetensors" / "parity.json").is_file()


def test_drawings_and_stores_of_other_programs_are_not_tvits(tmp_path):
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "mine.png").write_bytes(b"a photo")
    (plots / "own.png").write_bytes(to_png(Drawing("own", 8, 8, ())))
    write_pages(tmp_path, "", {"mine": None, "own": None, "none": None})
    assert files_below(plots) == ["mine.png"]
    (tmp_path / "store.json").write_text('{"books": []}')
    (tmp_path / "shard-of-glass.frames").touch()
    assert not is_store(tmp_path) and shard_paths(tmp_path) == []


@pytest.mark.parametrize("name", [".incoming", ".incoming.unpacking"])
def test_foreign_files_in_a_downloads_working_folder_are_refused(tmp_path, name):
    (tmp_path / name / "videos").mkdir(parents=True)
    (tmp_path / name / "videos" / "half.avi").touch()
    (tmp_path / name / "thesis.txt").touch()
    with pytest.raises(DataError, match=r"did not write: thesis\.txt"):
        DatasetFolder(tmp_path, "mini").new_incoming()
    (tmp_path / name / "thesis.txt").unlink()
    assert files_below(DatasetFolder(tmp_path, "mini").new_incoming()) == []


def test_foreign_archives_stay_and_messages_count_many_files(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"mine")
    assert "a.zip" not in fetch_files(tmp_path / "a.zip")
    with pytest.raises(RunError, match=r"a\.zip: .*Move it away"):
        Download(tmp_path / "a.zip", size=5).fetch(["http://127.0.0.1:9/a.zip"])
    (tmp_path / ".a.zip.source.json").write_text('{"url": "", "sha256": "of another file"}')
    with pytest.raises(RunError, match=r"a\.zip: .*Move it away"):
        Download(tmp_path / "a.zip", size=5).fetch(["http://127.0.0.1:9/a.zip"])
    assert (tmp_path / "a.zip").read_bytes() == b"mine"
    assert shorten(["a", "b", "c"]) == "a, b, c" and shorten(list("abcdefg")) == "a, b, c and 4 more"
