"""`tvit train`, from videos to a model folder: what it leaves, what it survives, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_fits
import torch
from tiny import COLOURS, last_weights, make_clips, make_pretrained, run, same, settings

from tvit_cli import cli
from tvit_cli.data.clips import ClipDataset
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.extract import extract
from tvit_cli.engine.train import checkpoint, train
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.fingerprint import check_fingerprint, check_ranks_agree
from tvit_cli.engine.train.optim import learning_rate_at
from tvit_cli.engine.train.run_folder import Run as RunFolder
from tvit_cli.engine.train.run_folder import next_name, run_lock
from tvit_cli.errors import (
    CheckpointError,
    DataError,
    ModelError,
    RunError,
    SettingsError,
    TvitError,
    VideoError,
)
from tvit_cli.model.folder import load_model
from tvit_cli.results import Event, Note, TrainResult
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.train import TrainSettings


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("weights") / "tiny-vit")


Run = Callable[..., TrainResult]


@pytest.fixture
def trained(clips: Path, pretrained: Path, tmp_path: Path) -> Run:
    """`trained(**changes)` trains on the clips below tmp_path."""

    def go(**changes: Any) -> TrainResult:
        facts = {"path_to_data": str(clips), "hf_model_name": str(pretrained), "working_directory": tmp_path}
        return run(**{**facts, **changes})

    return go


def typed(*words: str) -> None:
    """Run the program in this process; it ends well."""
    with pytest.raises(SystemExit) as ended:
        cli.run(words)
    assert not ended.value.code


def records(result: TrainResult, kind: str = "epoch") -> list[dict[str, Any]]:
    lines = (result.run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("seconds", "clips_per_second", "data_wait")}


def test_a_run_leaves_a_model_folder_metrics_and_checkpoints(trained: Run, clips: Path) -> None:
    result = trained()
    model, card = load_model(result.model)
    assert card.labels == tuple(COLOURS)
    assert card.preprocessing.n_frames == 4 and card.preprocessing.frame_size == 32
    assert card.settings["path_to_data"] == str(clips)
    assert card.base is not None and card.base.name.endswith("tiny-vit")
    assert model(torch.zeros(1, 4, 3, 32, 32)).shape == (1, 3)
    assert [r["epoch"] for r in records(result)] == [1, 2]
    assert {"train_loss", "train_clip_top1", "val_loss", "val_video_top1", "val_video_top2"} <= records(
        result
    )[0].keys()
    assert [p.name for p in list_checkpoints(result.run / "checkpoints")] == ["step-000003", "step-000006"]
    assert json.loads((result.run / "settings.json").read_text())["lora_rank"] == 8


def test_it_learns_what_colour_tells(trained: Run) -> None:
    result = trained(epochs=12, hue=0.0, test_at_end=True)
    assert records(result)[-1]["train_clip_top1"] > 0.9
    assert result.test is not None and result.test.metrics["video_top1"] == 1.0


def test_two_runs_of_one_seed_are_equal_bit_for_bit(trained: Run) -> None:
    a, b = trained(), trained(num_workers=2)
    assert same(last_weights(a), last_weights(b))
    assert [without_clock(r) for r in records(a)] == [without_clock(r) for r in records(b)]


def test_the_model_folder_holds_the_best_epoch_not_the_last(trained: Run) -> None:
    result = trained(epochs=6)
    epochs = records(result)
    best = max(epochs, key=lambda r: (r["val_video_top1"], -r["val_loss"]))
    assert result.best_epoch == best["epoch"]
    kept = load_checkpoint(list_checkpoints(result.run / "checkpoints")[best["epoch"] - 1])
    model, _ = load_model(result.model)
    assert torch.equal(model.classifier.weight, kept.trainable["classifier.weight"])


def test_without_validation_the_last_epoch_is_kept(trained: Run) -> None:
    result = trained(val_groups="none")
    model, card = load_model(result.model)
    assert result.best == {} and result.best_epoch == 2 and card.metrics == {}
    assert torch.equal(model.classifier.weight, last_weights(result)["classifier.weight"])
    assert "val_loss" not in records(result)[0]


# What is drawn for each clip, and what joins two of them: none of it may depend on how the work is cut up.
MIXED = {"mixup": 0.8, "cutmix": 1.0, "randaugment": 2, "random_erasing": 0.5, "label_smoothing": 0.1}


@pytest.mark.parametrize("changes", [{}, MIXED, {**MIXED, "repeats": 3}], ids=["plain", "mixed", "repeated"])
def test_accumulated_micro_batches_give_the_update_of_one_batch(
    trained: Run, changes: dict[str, Any]
) -> None:
    facts = {"lora_dropout": 0.0, **changes}
    one = last_weights(trained(per_gpu_batch_size=6, **facts))
    cut = last_weights(trained(per_gpu_batch_size=3, gradient_accumulation_steps=3, **facts))
    whole = last_weights(trained(per_gpu_batch_size=9, **facts))
    assert all(
        torch.allclose(cut[k], whole[k], atol=2e-4) for k in whole
    )  # 12 clips: the last window is partial
    assert not all(torch.allclose(one[k], whole[k], atol=2e-4) for k in whole)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 6),
        ({**MIXED, "repeats": 2, "save_every_steps": 5}, 10),
        ({"lora_init": "pissa"}, 6),
        ({"lora_use_dora": True}, 6),
        ({"train": "last-1"}, 6),
    ],
    ids=["plain", "mixed, within an epoch", "pissa", "dora", "last-1"],
)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    trained: Run, changes: dict[str, Any], kept: int
) -> None:
    facts = {"epochs": 4, "save_checkpoint_interval": 2, **changes}
    whole = trained(**facts)
    half = trained(**facts, num_workers=2)
    checkpoints = half.run / "checkpoints"
    for path in list_checkpoints(checkpoints):
        if path.name > f"step-{kept:06d}":
            shutil.rmtree(path)
    shutil.rmtree(half.model)
    again = trained(**facts, resume_from_checkpoint=str(checkpoints / f"step-{kept:06d}"))
    assert again.run == half.run
    assert same(last_weights(again), last_weights(whole))
    assert [without_clock(r) for r in records(again)] == [without_clock(r) for r in records(whole)]
    assert (again.model / "model.safetensors").read_bytes() == (
        whole.model / "model.safetensors"
    ).read_bytes()


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tvit_cli", "train", "--config", str(folder / "c.json"), *flags]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parents[1])])
    environ = {k: v for k, v in os.environ.items() if not k.startswith("TVIT_")}
    return subprocess.Popen(
        arguments,
        env={**environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_in_mid_epoch_and_resumed_it_ends_with_the_same_bits(
    trained: Run, tmp_path: Path, clips: Path, pretrained: Path, name: str
) -> None:
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
    child = start(command(tmp_path, "--experiment-name", "killed"))
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
    again = start(command(tmp_path, "--experiment-name", "killed", "--resume-from-checkpoint", "latest"))
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    resumed = TrainResult(tmp_path / "killed", tmp_path / "killed" / "model", 0, {}, None)
    assert same(last_weights(resumed), last_weights(whole))
    assert [without_clock(r) for r in records(resumed)] == [without_clock(r) for r in records(whole)]
    assert [without_clock(r) for r in records(resumed, "step")] == [
        without_clock(r) for r in records(whole, "step")
    ]


def test_two_processes_take_the_steps_of_one_and_one_of_them_speaks(
    trained: Run, tmp_path: Path, clips: Path, pretrained: Path
) -> None:
    # 5 clips each of 10: partners lie in the other process, too.
    facts = {"epochs": 3, "lora_dropout": 0.0, "per_gpu_batch_size": 5, "experiment_name": "one", **MIXED}
    one = trained(**facts, gradient_accumulation_steps=2)
    own = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, **facts
    )
    (tmp_path / "c.json").write_text(own.model_dump_json())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    child = start([*launcher, *command(tmp_path, "--experiment-name", "two")[1:]])
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert out.count("The model is in") == 1
    two = TrainResult(tmp_path / "two", tmp_path / "two" / "model", 0, {}, None)
    a, b = last_weights(one), last_weights(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)  # 12 clips: the last window has 2 of 10
    for x, y in zip(records(one), records(two), strict=True):
        assert x["train_loss"] == pytest.approx(y["train_loss"], rel=1e-4)
        assert x["val_video_top1"] == y["val_video_top1"]


def test_resuming_takes_the_runs_own_settings(trained: Run, tmp_path: Path) -> None:
    first = trained(epochs=2, experiment_name="mine")
    shutil.rmtree(first.model)
    result = start([sys.executable, "-m", "tvit_cli", "train", "--resume-from-checkpoint", "latest",
                    "--working-directory", str(tmp_path)])  # fmt: skip
    _, errors = result.communicate(timeout=60)
    assert result.returncode == 0, errors
    assert (first.model / "card.json").is_file()


def test_resume_refuses_changed_settings_and_shows_the_difference(trained: Run) -> None:
    first = trained()
    path = str(first.run / "checkpoints" / "step-000003")
    before = {name: (first.run / name).read_bytes() for name in ("settings.json", "metrics.jsonl")}
    with pytest.raises(CheckpointError, match=r"--learning-rate: 0.01 -> 0.02"):
        trained(resume_from_checkpoint=path, learning_rate=0.02)
    assert before == {name: (first.run / name).read_bytes() for name in before}
    trained(resume_from_checkpoint=path, num_workers=1, max_no_of_checkpoints=1)


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(trained: Run) -> None:
    from tvit_cli.engine.train import checkpoint

    result = trained(epochs=2)
    path = list_checkpoints(result.run / "checkpoints")[0]
    state = json.loads((path / "state.json").read_text())
    del state["identity"]["label_smoothing"], state["sha256"]["state.json"]
    state["sha256"]["state.json"] = checkpoint._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    assert same(last_weights(trained(epochs=2, resume_from_checkpoint=str(path))), last_weights(result))
    with pytest.raises(CheckpointError, match=r"--label-smoothing: 0.0 -> 0.1"):
        trained(epochs=2, label_smoothing=0.1, resume_from_checkpoint=str(path))


def test_resuming_with_other_videos_is_refused(trained: Run, clips: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    first = trained(path_to_data=str(data))
    old = next(data.glob("Red/*_g01_*"))
    old.rename(old.with_name("v_Red_g01_c09.avi"))  # as many as before, but not the same
    with pytest.raises(CheckpointError, match="training videos"):
        trained(path_to_data=str(data), resume_from_checkpoint=str(first.run / "checkpoints" / "step-000003"))


def test_a_run_that_was_moved_goes_on_where_it_is_now(trained: Run, tmp_path: Path) -> None:
    first = trained(epochs=2, checkpoint_dir="saved", experiment_name="mine")
    moved = tmp_path / "else" / "where"
    moved.parent.mkdir()
    shutil.move(first.run, moved)
    shutil.rmtree(moved / "model")
    result = trained(epochs=2, resume_from_checkpoint=str(moved / "saved" / "step-000003"))
    assert result.run == moved and (moved / "model" / "card.json").is_file()
    assert not first.run.exists()
    written = json.loads((moved / "settings.json").read_text())
    assert (written["experiment_name"], written["checkpoint_dir"]) == ("where", "saved")


def test_a_checkpoint_under_another_name_is_resumed(trained: Run) -> None:
    first = trained()
    good = first.run / "checkpoints" / "step-000003"
    copy = good.with_name("good")
    shutil.copytree(good, copy)
    again = trained(resume_from_checkpoint=str(copy))
    assert [r["step"] for r in records(again)] == [3, 6]


def test_two_trainings_never_share_a_folder(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvit_cli.engine.train import run_folder as module

    trained(experiment_name="colours-1")
    monkeypatch.setattr(module, "next_name", lambda root, data: "colours-9")
    (trained(epochs=1).run / "settings.json").rename(trained(epochs=1, experiment_name="x").run / "kept.json")
    folder = module.Run(trained(epochs=1, experiment_name="y").run, Path(), None)
    with pytest.raises(SettingsError, match="another training has just taken this name"):
        module.write_settings(folder, settings(), is_alone=True)


def test_logged_losses_do_not_depend_on_how_a_batch_is_cut(trained: Run) -> None:
    facts = {"lora_dropout": 0.0, "epochs": 1}
    whole = trained(per_gpu_batch_size=9, **facts)
    cut = trained(per_gpu_batch_size=3, gradient_accumulation_steps=3, **facts)
    for a, b in zip(records(whole, "step"), records(cut, "step"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_a_manifest_is_trained_on_and_scored_at_the_end(trained: Run, clips: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    rows = [f"{path},{path.parent.name}" for path in sorted(clips.glob("*/*.avi"))]
    manifest.write_text("\n".join(["path,label", *rows]) + "\n")
    result = trained(path_to_data=str(manifest), test_at_end=True, epochs=1)
    assert result.run.name == "list-1"
    assert result.test is not None and result.test.metrics["videos"] == 3


def test_data_that_vanishes_in_mid_run_ends_it(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvit_cli.data import clips as module

    def gone(*arguments: Any, **keywords: Any) -> None:
        raise VideoError("gone")

    monkeypatch.setattr(module, "read_clip", gone)
    with pytest.raises(RunError, match="no training video could be read"):
        trained(val_groups="none")


def test_the_last_epoch_is_always_saved_and_old_checkpoints_go(trained: Run) -> None:
    result = trained(epochs=5, save_checkpoint_interval=2, max_no_of_checkpoints=2)
    assert [p.name for p in list_checkpoints(result.run / "checkpoints")] == ["step-000012", "step-000015"]


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_survives(
    trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = checkpoint._write

    def write(path: Path, data: bytes) -> None:
        if "step-000006" in str(path):
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(RunError, match=r"the disk is full\. step-000003 is still whole"):
        trained(experiment_name="full")
    monkeypatch.undo()
    result = trained(experiment_name="full", resume_from_checkpoint="latest")
    assert same(last_weights(result), last_weights(trained()))


def test_names_are_the_first_free_and_nothing_is_overwritten_unasked(trained: Run, tmp_path: Path) -> None:
    assert [trained(epochs=1).run.name for _ in range(2)] == ["colours-1", "colours-2"]
    shutil.rmtree(tmp_path / "colours-1")
    assert next_name(tmp_path, "colours") == "colours-3"
    with pytest.raises(
        SettingsError, match=r"is finished\. Take another name .*or replace it with --overwrite"
    ):
        trained(experiment_name="colours-2")


def test_a_named_experiment_that_is_not_finished_is_gone_on_with(trained: Run) -> None:
    whole = trained(experiment_name="whole", epochs=3)
    half = trained(experiment_name="half", epochs=3)
    shutil.rmtree(list_checkpoints(half.run / "checkpoints")[-1])
    shutil.rmtree(half.model)
    again = trained(experiment_name="half", epochs=3)
    assert same(last_weights(again), last_weights(whole)) and again.run == half.run
    shutil.rmtree(again.model)
    shutil.rmtree(again.run / "checkpoints")
    shutil.rmtree(again.run / "plots")
    (again.run / "report.html").unlink()
    (again.run / "checkpoints" / ".step-000003.writing").mkdir(parents=True)  # killed in its first checkpoint
    anew = trained(experiment_name="half", epochs=3)
    assert same(last_weights(anew), last_weights(whole)) and len(records(anew)) == 3


def test_overwrite_refuses_foreign_folders_and_moved_checkpoints(trained: Run, tmp_path: Path) -> None:
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


def test_finished_run_without_test_scores_is_scored_on_resume(trained: Run) -> None:
    facts: dict[str, Any] = {"experiment_name": "mine", "epochs": 2, "test_at_end": True, "test_groups": "03"}
    first = trained(**facts)
    assert first.test is not None
    shutil.rmtree(first.run / "eval")  # killed while it scored
    again = trained(**facts)
    assert again.test is not None and again.test.metrics == first.test.metrics and len(records(again)) == 2
    with pytest.raises(SettingsError, match="is finished"):
        trained(**facts)


def test_a_run_of_several_processes_goes_on_with_as_many(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trained(experiment_name="mine", num_processes=2)
    last = list_checkpoints(own.run / "checkpoints")[-1]
    started: list[int] = []
    monkeypatch.setattr(
        "tvit_cli.engine.launch.run_local_processes", lambda count, *rest, **more: started.append(count) or 0
    )
    typed("train", "--resume-from-checkpoint", str(last))
    typed("train", "--resume-from-checkpoint", str(last), "--num-processes", "3")
    assert started == [2, 3]
    found = load_checkpoint(last).state.identity
    with pytest.raises(
        CheckpointError, match=r"processes: 2 -> 1\n.*\nIt takes 2 processes \(--num-processes"
    ):
        check_fingerprint({**found, "processes": 2}, found)
    with pytest.raises(
        CheckpointError, match="began with videos goes on with them: move its frame store away"
    ):
        check_fingerprint(found, {**found, "frames": "store, of 32 frames"})


def test_settings_of_a_resumed_run_are_shown_as_they_are(
    trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(experiment_name="mine", lora_rank=3)
    last = list_checkpoints(own.run / "checkpoints")[-1]
    typed("train", "--resume-from-checkpoint", str(last), "--show-settings")
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["lora_rank"])
    assert shown.split()[1] == "3" and "settings.json" in shown


def test_all_frames_of_a_tubelet_are_learnt_from_beside_pretrained_weights(trained: Run) -> None:
    model, _ = load_model(trained(tubelet_size=2, epochs=1).model)
    first, central = model.patch_embed.weight.detach().chunk(2, dim=1)
    assert 0 < first.abs().mean() < 0.2 * central.abs().mean()  # they started at nothing


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "classifier"},
        {"train": "last-1"},
        {"lora_rank": 0, "lora_bias": "all"},
        {"lora_init": "pissa"},
        {"lora_init": "orthogonal"},
    ],
    ids=str,
)
def test_a_frozen_model_of_tubelets_is_said_to_see_one_frame_of_each(
    clips: Path, pretrained: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    events: list[Event] = []
    facts = {"path_to_data": str(clips), "hf_model_name": str(pretrained), "working_directory": tmp_path}
    train(settings(**facts, **changes, tubelet_size=2, epochs=1), events.append)
    assert any("Of each tubelet of 2 frames the model sees one" in str(event) for event in events)


def test_the_rate_warms_up_in_epochs_and_falls_as_the_schedule_says(trained: Run) -> None:
    result = trained(warmup_epochs=1, epochs=3, learning_rate=0.01)
    steps = records(result, "step")
    assert [record["step"] for record in steps] == list(range(1, 10))  # three of an epoch
    rates = [learning_rate_at(step, peak=0.01, warmup_steps=3, total_steps=9) for step in range(9)]
    assert [record["learning_rate"] for record in steps] == pytest.approx(rates)
    assert all(record["grad_norm"] > 0 for record in steps)


def test_other_scheme_at_start_and_ineffective_settings_are_noted(
    trained: Run, clips: Path, tmp_path: Path
) -> None:
    before = trained(attention="divided", epochs=1)
    events: list[Event] = []
    facts = {"path_to_data": str(clips), "hf_model_name": str(before.model), "working_directory": tmp_path}
    train(settings(**facts, epochs=1, randaugment_magnitude=5), events.append)
    said = " ".join(map(str, events))
    assert "was trained with --attention divided. With others, what it learnt of time is left out." in said
    assert "--randaugment-magnitude 5: nothing comes of it without --randaugment" in said
    events.clear()
    train(settings(**facts, epochs=1, attention="divided"), events.append)
    assert "is left out" not in " ".join(map(str, events))


def test_processes_that_see_different_videos_do_not_start() -> None:
    own = {"training videos": "12 (ab)", "frames": "videos"}
    check_ranks_agree([own, own])
    with pytest.raises(RunError, match=r"Process 1 has not what process 0 has \(training videos\)"):
        check_ranks_agree([own, {**own, "training videos": "11 (cd)"}])


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there")
def test_a_name_that_is_not_utf_8_is_trained_on_scored_and_predicted(
    clips: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "colours"
    shutil.copytree(clips, data)
    for path in (*data.glob("Red/*"), *data.glob("Blue/*")):
        os.rename(path, os.fsencode(path).replace(b"_c01", b"_caf\xe9_c01"))  # noqa: PTH104  # bytes
    os.rename(data / "Red", os.fsencode(data / "R") + b"\xe9d")  # noqa: PTH104
    result = run(
        path_to_data=str(data), hf_model_name=str(pretrained), working_directory=tmp_path, test_groups="03"
    )
    found = evaluate(EvalSettings(model=result.model, num_workers=0, device="cpu"))
    assert "R\\udce9d" in found.labels and found.report is not None
    assert r"caf\udce9" in (found.output / "scores.csv").read_text(encoding="utf-8")
    typed("predict", str(data), "--model", str(result.model), "--json", "--device", "cpu")
    assert capsys.readouterr().out.count("udce9_c01") == 2 * len(list(data.glob("Blue/*")))


def test_an_experiment_is_replaced_only_when_told_to(trained: Run) -> None:
    first = trained(experiment_name="mine", epochs=3)
    second = trained(experiment_name="mine", epochs=1, overwrite=True)
    assert second.run == first.run
    assert [p.name for p in list_checkpoints(second.run / "checkpoints")] == ["step-000003"]
    assert len(records(second)) == 1


def test_a_folder_that_another_training_is_busy_in_is_left_alone(trained: Run) -> None:
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
        run_lock(RunFolder(first.run, first.run / "checkpoints", None)),
    ):
        pass
    holder.communicate(b"")
    trained(experiment_name="mine", epochs=3)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_trained_on(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", none)
    assert trained(epochs=1).model.is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text("{}")  # who knows whether one is busy in it
    with pytest.raises(SettingsError, match=r"there are no locks here .* Take another --experiment-name"):
        trained(experiment_name="mine", epochs=1)


def test_unreadable_clips_are_named_set_aside_and_change_nothing_else(
    clips: Path, pretrained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data" / "colours"
    shutil.copytree(clips, data)
    text, empty = data / "Red" / "v_Red_g02_c09.avi", data / "Blue" / "v_Blue_g01_c09.avi"
    text.write_text("not a video\n" * 50)
    empty.touch()
    events: list[Event] = []
    facts = settings(
        path_to_data=str(data),
        hf_model_name=str(pretrained),
        working_directory=tmp_path / "runs",
        val_groups="01",
        test_groups="03",
    )
    with_bad = train(facts, events.append)
    text.unlink()
    empty.unlink()
    assert same(last_weights(with_bad), last_weights(train(facts)))
    warnings = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    assert any("v_Red_g02_c09.avi" in w for w in warnings)
    assert any("v_Blue_g01_c09.avi" in w and "empty" in w for w in warnings)


def make_bad(kind: str, clips: Path, root: Path) -> Path:
    data = root / "bad"
    if kind == "missing":
        return data
    shutil.copytree(clips, data)
    if kind == "empty class":
        (data / "Yellow").mkdir()
    if kind == "one class":
        for label in ("Blue", "Green"):
            shutil.rmtree(data / label)
    if kind == "unreadable class":
        for path in (data / "Red").iterdir():
            path.write_text("text")
    return data


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such folder"),
        ("empty class", "Yellow"),
        ("one class", "one class"),
        ("unreadable class", "cannot be read|class Red"),
    ],
)
def test_unusable_data_is_refused_before_the_model_is_built(
    clips: Path, tmp_path: Path, kind: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        run(
            path_to_data=str(make_bad(kind, clips, tmp_path)),
            hf_model_name=None,
            working_directory=tmp_path / "runs",
        )
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lora_target_modules": "qq"}, ModelError, "patch_embed"),
        ({"lora_rank_pattern": {"fc1": 2}}, ModelError, "--lora-target-modules too"),
        ({"lora_init": "pissa", "lora_target_modules": "patch_embed"}, ModelError, "is a convolution"),
        ({"train": "last-9"}, ModelError, "--train last-9: the model has"),
        ({"img_size": 33}, ModelError, "--img-size 33 is not a multiple"),
        ({"hf_model_name": "no/such-model"}, ModelError, "no/such-model"),
        ({"val_groups": "g99"}, DataError, "g99"),
        ({"resume_from_checkpoint": "latest"}, TvitError, "no run with a checkpoint"),
        pytest.param(
            {"device": "cuda"}, ModelError, "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_and_leaves_no_run(
    trained: Run, changes: dict[str, str], error: type, words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        trained(**changes)
    assert not list(tmp_path.iterdir())


def test_top_k_above_the_number_of_classes_is_clamped_and_said(
    clips: Path, pretrained: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    facts = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, top_k=50
    )
    result = train(facts, events.append)
    assert any("top-3" in e.text for e in events if isinstance(e, Note))
    assert "val_video_top3" in records(result)[0]


def test_a_decoding_process_that_dies_ends_the_run_with_one_sentence(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: ClipDataset, key: tuple[int, int]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ClipDataset, "__getitem__", dies)
    with pytest.raises(RunError, match="A process that decodes videos died"):
        trained(num_workers=1)


def test_leaks_are_said_and_strict_refuses_them(clips: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for subset in ("train", "test"):
        for label in COLOURS:
            shutil.copytree(clips / label, data / subset / label)
    facts = {
        "path_to_data": str(data),
        "hf_model_name": None,
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "epochs": 1,
    }
    facts |= {
        "working_directory": tmp_path / "runs",
        "val_groups": "none",
        "test_groups": "none",
        "train": "all",
    }
    events: list[Event] = []
    train(settings(**facts), events.append)
    warnings = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    assert any("share 6 groups" in w for w in warnings) and any(
        "18 videos stand in two subsets" in w for w in warnings
    )
    with pytest.raises(DataError, match="share 6 groups"):
        train(settings(**facts, strict=True))


def test_more_unreadable_videos_than_allowed_stop_the_run_before_it_starts(
    clips: Path, pretrained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    for group in (2, 3, 4, 5):
        (data / "Red" / f"v_Red_g{group:02d}_c01.avi").write_text("text")
    facts = {
        "path_to_data": str(data),
        "hf_model_name": str(pretrained),
        "working_directory": tmp_path / "runs",
    }
    with pytest.raises(DataError, match=r"4 of 18 videos cannot be read.*allows 3"):
        run(**facts)
    assert not (tmp_path / "runs").exists()
    run(**facts, max_bad="25%", epochs=1)


def weights_differ(base: TrainResult, changed: TrainResult) -> bool:
    return not same(last_weights(base), last_weights(changed))


def counts_differ(base: TrainResult, changed: TrainResult) -> bool:
    return records(base, "step")[-1]["step"] != records(changed, "step")[-1]["step"] or weights_differ(
        base, changed
    )


def formats_differ(base: TrainResult, changed: TrainResult) -> bool:
    """The training's format, and that of the test at its end."""
    said = [
        json.loads((result.run / "eval" / "test" / "metrics.json").read_text())["mixed_precision"]
        for result in (base, changed)
    ]
    return weights_differ(base, changed) and said == ["no", "bf16"]


def average_is_kept(base: TrainResult, changed: TrainResult) -> bool:
    """The raw weights are trained as ever; what is validated and saved is another thing."""
    a, b = (load_model(result.model)[0].classifier.weight for result in (base, changed))
    said = "ema_decay" in records(changed)[0] and "ema_decay" not in records(base)[0]
    return same(last_weights(base), last_weights(changed)) and not torch.equal(a, b) and said


SCRATCH = {"hf_model_name": None, "width": 16, "depth": 1, "num_heads": 2, "patch_size": 16}
ALL = {"train": "all"}
# Groups of which class Red has others than the two that are held out: 6 of its clips are in train, 4 of the rest.
UNEVEN = {"group_pattern": r"(Red_g0[12]|g\d+)", "val_groups": "g01", "test_groups": "g02"}
STANDSTILL = {"epochs": 4, "learning_rate": 1e-30}

# setting -> (base settings, value, what has to be true of the base run and the changed one)
EFFECTS: dict[str, tuple[dict[str, Any], Any, Callable[[TrainResult, TrainResult], bool]]] = {
    "experiment_name": ({}, "mine", lambda a, b: b.run.name == "mine"),
    "working_directory": ({}, "elsewhere", lambda a, b: b.run.parent.name == "elsewhere"),
    "seed": ({}, 5, weights_differ),
    "log_wandb": ({}, True, lambda a, b: (b.run / "wandb").is_dir() and not (a.run / "wandb").exists()),
    "log_tensorboard": (
        {},
        True,
        lambda a, b: (b.run / "tensorboard").is_dir() and not (a.run / "tensorboard").exists(),
    ),
    "test_at_end": ({}, True, lambda a, b: a.test is None and b.test is not None),
    "top_k": (
        {},
        3,
        lambda a, b: "val_video_top3" in records(b)[0] and "val_video_top3" not in records(a)[0],
    ),
    "group_pattern": ({"val_groups": "none"}, r"_g0(?=[1-3])|_g", counts_differ),
    "val_groups": ({}, "2", counts_differ),
    "test_groups": ({}, "2", counts_differ),
    "n_frames": ({}, 2, weights_differ),
    "img_size": ({}, 48, weights_differ),
    "frame_grid": ({}, 4, weights_differ),
    "resize": ({}, "squash", weights_differ),
    "hf_model_name": ({}, None, weights_differ),
    "width": (SCRATCH, 32, weights_differ),
    "depth": (SCRATCH, 2, weights_differ),
    "num_heads": (SCRATCH, 4, weights_differ),
    "patch_size": (SCRATCH, 8, weights_differ),
    "tubelet_size": (ALL, 2, weights_differ),
    "attention": ({}, "divided", weights_differ),
    "temporal_depth": ({"attention": "factorized"}, 1, weights_differ),
    "pool": ({}, "attentive", weights_differ),
    "temporal_rate": ({"attention": "factorized"}, 1.0, weights_differ),
    "feature_norm": ({}, True, weights_differ),
    "custom_weight_init": ({}, True, weights_differ),
    "train": ({}, "classifier", weights_differ),
    "lora_rank": ({}, 4, weights_differ),
    "lora_alpha": ({}, 32, weights_differ),
    "lora_rank_pattern": ({}, {"q": 2}, weights_differ),
    "lora_alpha_pattern": ({}, {"q": 32}, weights_differ),
    "lora_use_rslora": ({}, True, weights_differ),
    "lora_use_dora": ({}, True, weights_differ),
    "lora_init": ({}, "gaussian", weights_differ),
    "lora_dropout": ({}, 0.5, weights_differ),
    "lora_bias": ({}, "lora_only", weights_differ),
    "lora_target_modules": ({}, "fc1", weights_differ),
    "lora_exclude_modules": ({}, "q", weights_differ),
    "epochs": ({}, 1, counts_differ),
    "warmup_epochs": ({}, 2, weights_differ),
    "per_gpu_batch_size": ({}, 5, weights_differ),
    "gradient_accumulation_steps": ({}, 2, counts_differ),
    "global_batch_size": ({}, 8, counts_differ),
    "learning_rate": ({}, 0.02, weights_differ),
    "weight_decay": ({}, 0.5, weights_differ),
    "label_smoothing": ({}, 0.2, weights_differ),
    "bias_weight_decay": ({}, True, weights_differ),
    "norm_weight_decay": (ALL, True, weights_differ),
    "max_grad_norm": ({}, 0.01, weights_differ),
    "adam_beta1": ({}, 0.5, weights_differ),
    "adam_beta2": ({}, 0.9, weights_differ),
    "adam_epsilon": ({}, 1e-2, weights_differ),
    "mixed_precision": ({"test_at_end": True}, "bf16", formats_differ),
    "crop_scale_min": ({}, 1.0, weights_differ),
    "horizontal_flip": ({}, 0.0, weights_differ),
    "brightness": ({}, 0.0, weights_differ),
    "contrast": ({}, 0.0, weights_differ),
    "saturation": ({}, 0.0, weights_differ),
    "hue": ({}, 0.3, weights_differ),
    "drop_path": ({}, 0.5, weights_differ),
    "token_drop": ({}, 0.5, weights_differ),
    "ema_decay": ({}, 0.9, average_is_kept),
    "layer_decay": ({}, 0.5, weights_differ),
    "class_weights": (UNEVEN, "balanced", weights_differ),
    "balanced_sampling": (UNEVEN, True, weights_differ),
    "patience": (STANDSTILL, 1, lambda a, b: len(records(a)) == 4 and len(records(b)) == 2),
    "mixup": ({}, 0.8, weights_differ),
    "cutmix": ({}, 1.0, weights_differ),
    "randaugment": ({}, 2, weights_differ),
    "randaugment_magnitude": ({"randaugment": 2}, 3.0, weights_differ),
    "random_erasing": ({}, 1.0, weights_differ),
    "repeats": ({}, 2, lambda a, b: (records(a)[0]["step"], records(b)[0]["step"]) == (3, 6)),
    "checkpoint_dir": ({}, "saved", lambda a, b: (b.run / "saved").is_dir()),
    "save_checkpoint_interval": ({}, 2, lambda a, b: len(list_checkpoints(b.run / "checkpoints")) == 1),
    "save_every_steps": (
        {},
        2,
        lambda a, b: (
            [p.name for p in list_checkpoints(b.run / "checkpoints")]
            == [f"step-{n:06d}" for n in (2, 3, 4, 6)]
        ),
    ),
    "save_every_minutes": (
        {},
        1e-9,
        lambda a, b: (
            [p.name for p in list_checkpoints(b.run / "checkpoints")]
            == [f"step-{n:06d}" for n in range(1, 7)]
        ),
    ),
    "max_no_of_checkpoints": ({}, 1, lambda a, b: len(list_checkpoints(b.run / "checkpoints")) == 1),
}


BASES: dict[str, TrainResult] = {}


@pytest.mark.parametrize("name", EFFECTS)
def test_no_setting_without_an_effect(
    name: str, clips: Path, pretrained: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, value, shows = EFFECTS[name]
    facts = {
        "path_to_data": str(clips),
        "hf_model_name": str(pretrained),
        "working_directory": tmp_path,
        **base,
    }
    if str(base) not in BASES:
        BASES[str(base)] = run(**{**facts, "working_directory": tmp_path_factory.mktemp("base")})
    if name == "working_directory":
        value = tmp_path / value
    monkeypatch.setenv("WANDB_MODE", "offline")
    changed = run(**{**facts, name: value})
    assert shows(BASES[str(base)], changed)


def test_workers_are_as_many_as_asked_for(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvit_cli.data import clips

    asked: list[int] = []
    real = clips.DataLoader

    def spy(*arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords["num_workers"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(clips, "DataLoader", spy)
    trained(epochs=1, num_workers=2)
    assert asked[0] == 2  # of the training; validation has fewer batches


def test_the_official_split_decides_what_is_trained_on(trained: Run, clips: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clips, data / "videos")
    lists = data / "splits"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {label}\n" for i, label in enumerate(COLOURS, start=1)))
    for split in (1, 2, 3):
        for side in ("train", "test"):
            rows = [
                f"{label}/v_{label}_g{group:02d}_c01.avi"
                for label in COLOURS
                for group in range(1, 7)
                if (group <= split) == (side == "test")
            ]
            (lists / f"{side}list{split:02d}.txt").write_text("\n".join(rows) + "\n")
    facts = {
        "path_to_data": str(data),
        "val_groups": "none",
        "test_groups": "none",
        "epochs": 1,
        "test_at_end": True,
    }
    for split, tested in ((1, 3), (3, 9)):
        result = trained(**facts, split=split)
        assert result.test is not None and result.test.metrics["videos"] == tested
        assert sum(r["kind"] == "step" for r in records(result, "step")) == -(-(18 - tested) // 4)


def test_a_frame_store_beside_the_videos_is_found_used_and_scored(
    clips: Path, pretrained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "colours"
    shutil.copytree(clips, data)
    facts = {
        "path_to_data": str(data),
        "hf_model_name": str(pretrained),
        "working_directory": tmp_path / "runs",
    }
    facts |= {"epochs": 6, "test_at_end": True, "frame_grid": 6}
    from_videos = run(**facts)
    extract(ExtractSettings(path_to_data=str(data), num_workers=0, frames_per_video=6), lambda event: None)
    events: list[Event] = []
    from_store = train(settings(**facts), events.append)
    assert any("Frames are read from" in e.text for e in events if isinstance(e, Note))
    losses = [[r["train_loss"] for r in records(result)] for result in (from_videos, from_store)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(
        losses[1], abs=0.1
    )  # the same frames, as JPEG
    assert from_store.test is not None and from_store.test.metrics["videos"] == 3
    written = json.loads((from_store.run / "eval" / "test" / "metrics.json").read_text())
    assert written["frames"] == "frame store"
    with pytest.raises(CheckpointError, match="frames"):
        train(settings(**facts, resume_from_checkpoint=str(from_videos.run / "checkpoints" / "step-000003")))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_two_processes_that_are_killed_and_resumed_end_with_the_same_bits(
    tmp_path: Path, clips: Path, pretrained: Path, name: str
) -> None:
    changes = {"epochs": 60, "num_processes": 2, "max_no_of_checkpoints": 2, "val_groups": "none"}
    own = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, **changes
    )
    (tmp_path / "c.json").write_text(own.model_dump_json())
    whole = start(command(tmp_path, "--experiment-name", "whole"))
    out, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0 and out.count("The model is in") == 1, errors
    checkpoints = tmp_path / "killed" / "checkpoints"
    child = start(command(tmp_path, "--experiment-name", "killed"))
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
    again = start(command(tmp_path, "--experiment-name", "killed", "--resume-from-checkpoint", "latest"))
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    runs = [TrainResult(tmp_path / n, tmp_path / n / "model", 0, {}, None) for n in ("whole", "killed")]
    assert same(*map(last_weights, runs))
    one, two = ([without_clock(r) for r in records(run, "step")] for run in runs)
    assert one == two


def is_rank(process: Path, rank: str, folder: Path) -> bool:
    """Whether a process is that rank of a training whose configuration lies in a folder."""
    try:
        environ = (process / "environ").read_bytes().split(b"\0")
        words = (process / "cmdline").read_text()
    except OSError:
        return False
    return f"RANK={rank}".encode() in environ and str(folder) in words and "killed" in words


def test_print_settings_shows_sources_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TVIT_EPOCHS", "7")
    words = ["train", "--show-settings", "--preset", "quickstart", "--lora-rank", "3"]
    cli.build_app()(words, standalone_mode=False)
    shown = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert [word.strip() for word in shown["lora_rank"]] == ["3", "flag"]
    assert [word.strip() for word in shown["epochs"]] == ["7", "environment"]
    assert [word.strip() for word in shown["width"]] == ["128", "preset quickstart"]
    assert [word.strip() for word in shown["adam_beta1"]] == ["0.9", "default"]
    assert not list(tmp_path.iterdir())


SHOWN_ELSEWHERE = {
    "dry_run": test_fits.test_a_dry_run_says_what_a_training_takes_and_writes_nothing,
    "gradient_checkpointing": test_fits.test_gradient_checkpointing_has_the_same_bits_with_less_memory,
    "compile": test_fits.test_compiled_run_compiles_each_size_once_and_keeps_names,
    "show_settings": test_print_settings_shows_sources_and_trains_nothing,
    "overwrite": test_an_experiment_is_replaced_only_when_told_to,
    "num_processes": test_two_processes_that_are_killed_and_resumed_end_with_the_same_bits,
    "split": test_the_official_split_decides_what_is_trained_on,
    "strict": test_leaks_are_said_and_strict_refuses_them,
    "max_bad": test_more_unreadable_videos_than_allowed_stop_the_run_before_it_starts,
    "path_to_data": test_unusable_data_is_refused_before_the_model_is_built,
    "resume_from_checkpoint": test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits,
    "device": test_what_cannot_be_used_is_named_and_leaves_no_run,
    "num_workers": test_workers_are_as_many_as_asked_for,
}


def test_every_setting_has_a_test_of_its_effect() -> None:
    assert set(EFFECTS) | set(SHOWN_ELSEWHERE) == set(TrainSettings.model_fields)
