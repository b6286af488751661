"""Training from videos to a model folder: the loop, its data, notes and refusals."""

import json
import os
import shutil
import sys

import pytest
import torch
from entry import start
from tiny import COLOURS, MIXED, SCRATCH, last_weights, records, run, run_in, same, settings

from tvit_cli import cli
from tvit_cli.data import clips as clips_module
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.extract import extract
from tvit_cli.engine.train import set_up, train
from tvit_cli.engine.train.build import build
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.optim import learning_rate_at
from tvit_cli.errors import CheckpointError, DataError, ModelError, RunError, TvitError, VideoError
from tvit_cli.model.folder import load_model
from tvit_cli.results import ClassTable, Note
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.extract import ExtractSettings

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_leaves_a_model_folder_metrics_and_checkpoints(finished, clips):
    result = finished
    model, card = load_model(result.model)
    assert card.labels == tuple(COLOURS)
    assert card.preprocessing.n_frames == 4 and card.preprocessing.frame_size == 32
    assert card.settings["path_to_data"] == str(clips)
    assert card.base is not None and card.base.name.endswith("tiny-vit")
    assert model(torch.zeros(1, 4, 3, 32, 32)).shape == (1, 3)
    assert [r["epoch"] for r in records(result)] == [1, 2]
    names = {"train_loss", "train_clip_top1", "val_loss", "val_video_top1", "val_video_top2"}
    assert names <= records(result)[0].keys()
    assert [p.name for p in list_checkpoints(result.run / "checkpoints")] == ["step-000003", "step-000006"]
    assert json.loads((result.run / "settings.json").read_text())["lora_rank"] == 8


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
def test_a_frozen_model_of_tubelets_is_said_to_see_one_frame_of_each(pretrained, changes):
    events = []
    own = settings(hf_model_name=str(pretrained), **changes, tubelet_size=2)
    build(own, labels=("a", "b", "c"), report=events.append)
    assert any("The model uses one frame of each tubelet of 2" in str(event) for event in events)


def test_other_scheme_at_start_and_ineffective_settings_are_noted(trained, clips, tmp_path):
    before = trained(attention="divided", epochs=1)
    events = []
    facts = {"path_to_data": str(clips), "hf_model_name": str(before.model), "working_directory": tmp_path}
    train(settings(**facts, epochs=1, randaugment_magnitude=5), events.append)
    said = " ".join(map(str, events))
    assert "was trained with --attention divided. Its temporal weights are left out." in said
    assert "--randaugment-magnitude 5: no effect without --randaugment" in said
    events.clear()
    train(settings(**facts, epochs=1, attention="divided"), events.append)
    assert "are left out" not in " ".join(map(str, events))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lora_target_modules": "qq"}, ModelError, "patch_embed"),
        ({"lora_rank_pattern": {"fc1": 2}}, ModelError, "Add it to --lora-target-modules"),
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
def test_what_cannot_be_used_is_named_and_leaves_no_run(trained, changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        trained(**changes)
    assert not list(tmp_path.iterdir())


def test_top_k_above_the_number_of_classes_is_clamped_and_said(clips, pretrained, tmp_path):
    events = []
    facts = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, top_k=50
    )
    result = train(facts, events.append)
    assert any("top-3" in e.text for e in events if isinstance(e, Note))
    assert "val_video_top3" in records(result)[0]


def test_print_settings_shows_sources_and_trains_nothing(tmp_path, monkeypatch, capsys):
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


def test_it_learns_what_colour_tells(trained):
    result = trained(epochs=12, hue=0.0, test_at_end=True)
    assert records(result)[-1]["train_clip_top1"] > 0.9
    assert result.test is not None and result.test.metrics["video_top1"] == 1.0


def test_two_runs_of_one_seed_are_equal_bit_for_bit(finished, trained):
    a, b = finished, trained(num_workers=2)
    assert same(last_weights(a), last_weights(b))
    assert records(a) == records(b)


def test_the_model_folder_holds_the_best_epoch_or_else_the_last(trained):
    result = trained(epochs=6)
    epochs = records(result)
    best = max(epochs, key=lambda r: (r["val_video_top1"], -r["val_loss"]))
    assert result.best_epoch == best["epoch"]
    kept = load_checkpoint(list_checkpoints(result.run / "checkpoints")[best["epoch"] - 1])
    model, _ = load_model(result.model)
    assert torch.equal(model.classifier.weight, kept.trainable["classifier.weight"])
    result = trained(val_groups="none")
    model, card = load_model(result.model)
    assert result.best == {} and result.best_epoch == 2 and card.metrics == {}
    assert torch.equal(model.classifier.weight, last_weights(result)["classifier.weight"])
    assert "val_loss" not in records(result)[0]


@pytest.mark.parametrize("changes", [{}, MIXED, {**MIXED, "repeats": 3}], ids=["plain", "mixed", "repeated"])
def test_accumulated_micro_batches_give_the_update_of_one_batch(trained, changes):
    facts = {"lora_dropout": 0.0, "epochs": 1, **changes}
    runs = (
        trained(per_gpu_batch_size=3, gradient_accumulation_steps=3, **facts),
        trained(per_gpu_batch_size=9, **facts),
    )
    one, cut, whole = map(last_weights, (trained(per_gpu_batch_size=6, **facts), *runs))
    # 12 clips: the last window is partial
    assert all(torch.allclose(cut[k], whole[k], atol=2e-4) for k in whole)
    assert not all(torch.allclose(one[k], whole[k], atol=2e-4) for k in whole)
    for a, b in zip(*(records(each, "step") for each in runs), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_two_processes_take_the_steps_of_one_and_one_of_them_speaks(trained, tmp_path, clips, pretrained):
    # 5 clips each of 10: partners lie in the other process, too.
    facts = {"epochs": 3, "lora_dropout": 0.0, "per_gpu_batch_size": 5, "experiment_name": "one", **MIXED}
    one = trained(**facts, gradient_accumulation_steps=2)
    own = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, **facts
    )
    (tmp_path / "c.json").write_text(own.model_dump_json())
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "tvit_cli")
    child = start(*launcher, "train", "--config", tmp_path / "c.json", "--experiment-name", "two")
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert out.count("The model is in") == 1
    two = run_in(tmp_path / "two")
    a, b = last_weights(one), last_weights(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)  # 12 clips: the last window has 2 of 10
    for x, y in zip(records(one), records(two), strict=True):
        assert x["train_loss"] == pytest.approx(y["train_loss"], rel=1e-4)
        assert x["val_video_top1"] == y["val_video_top1"]


def test_all_frames_of_a_tubelet_are_learnt_from_beside_pretrained_weights(trained):
    model, _ = load_model(trained(tubelet_size=2, epochs=1).model)
    first, central = model.patch_embed.weight.detach().chunk(2, dim=1)
    assert 0 < first.abs().mean() < 0.2 * central.abs().mean()  # they started at nothing


def test_the_rate_warms_up_in_epochs_and_falls_as_the_schedule_says(trained):
    result = trained(warmup_epochs=1, epochs=3, learning_rate=0.01, classifier_rate=4)
    assert "learning rate 0.01, of the classifier 0.04" in result.report.read_text()
    steps = records(result, "step")
    assert [record["step"] for record in steps] == list(range(1, 10))  # three of an epoch
    rates = [learning_rate_at(step, peak=0.01, warmup_steps=3, total_steps=9) for step in range(9)]
    assert [record["learning_rate"] for record in steps] == pytest.approx(rates)
    assert all(record["grad_norm"] > 0 for record in steps)


def test_workers_are_as_many_as_asked_for(trained, monkeypatch):
    asked = []
    real = clips_module.DataLoader

    def spy(*arguments, **keywords):
        asked.append(keywords["num_workers"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(clips_module, "DataLoader", spy)
    trained(epochs=1, num_workers=2)
    assert asked[0] == 2  # of the training; validation has fewer batches


def test_a_manifest_is_trained_on_and_scored_at_the_end(trained, clips, tmp_path):
    manifest = tmp_path / "list.csv"
    rows = [f"{path},{path.parent.name}" for path in sorted(clips.glob("*/*.avi"))]
    manifest.write_text("\n".join(["path,label", *rows]) + "\n")
    result = trained(path_to_data=str(manifest), test_at_end=True, epochs=1)
    assert result.run.name == "list-1"
    assert result.test is not None and result.test.metrics["videos"] == 3


def test_data_that_vanishes_in_mid_run_ends_it(trained, monkeypatch):
    def gone(*arguments, **keywords):
        raise VideoError("gone")

    monkeypatch.setattr("tvit_cli.data.clips.read_clip", gone)
    with pytest.raises(RunError, match="no training video could be read"):
        trained(val_groups="none")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there")
def test_a_name_that_is_not_utf_8_is_trained_on_scored_and_predicted(clips, pretrained, tmp_path):
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
    predicted = start("-m", "tvit_cli", "predict", data, "--model", result.model, "--json", "--device", "cpu")
    out, _ = predicted.communicate(timeout=100)
    assert predicted.returncode == 0 and out.count("udce9_c01") == 2 * len(list(data.glob("Blue/*")))


def test_unreadable_clips_are_named_set_aside_and_change_nothing_else(clips, pretrained, tmp_path):
    data = tmp_path / "data" / "colours"
    shutil.copytree(clips, data)
    text, empty = data / "Red" / "v_Red_g02_c09.avi", data / "Blue" / "v_Blue_g01_c09.avi"
    text.write_text("not a video\n" * 50)
    empty.touch()
    events = []
    facts = settings(
        path_to_data=str(data), hf_model_name=str(pretrained), working_directory=tmp_path / "runs",
        val_groups="01", test_groups="03",
    )  # fmt: skip
    with_bad = train(facts, events.append)
    text.unlink()
    empty.unlink()
    assert same(last_weights(with_bad), last_weights(train(facts)))
    warnings = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    assert any("v_Red_g02_c09.avi" in w for w in warnings)
    assert any("v_Blue_g01_c09.avi" in w and "empty" in w for w in warnings)


def make_bad(kind, clips, root):
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
def test_unusable_data_is_refused_before_the_model_is_built(clips, tmp_path, kind, words):
    with pytest.raises(DataError, match=words):
        run(
            path_to_data=str(make_bad(kind, clips, tmp_path)),
            hf_model_name=None,
            working_directory=tmp_path / "runs",
        )
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


def test_classes_and_their_doubts_are_reported_before_a_training(make_classes, tmp_path):
    groups = [f"a_g{n:02}_{c}.avi" for n in range(1, 4) for c in "ab"]
    data = make_classes(tmp_path / "data", {"run": groups, "walk": groups, "sit": ["a_g09_a.avi"]})
    events = []
    set_up(settings(path_to_data=str(data), **SCRATCH, per_gpu_batch_size=16), events.append)
    (table,) = (event for event in events if isinstance(event, ClassTable))
    assert table.columns == ("class", "train", "groups", "val", "groups", "test", "groups")
    assert table.rows == (("run", 2, 1, 2, 1, 2, 1), ("sit", 1, 1, 0, 0, 0, 0), ("walk", 2, 1, 2, 1, 2, 1))
    assert table.total == ("all", 5, 2, 4, 1, 4, 1)
    warnings = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    for text in (
        "No validation video of 1 of 3 classes: sit.",
        "No test video of 1 of 3 classes: sit.",
        "4 validation videos of 1 group, fewer than 30: one video is 25% of top-1",
        "One step per epoch: a batch of 16 has all 5 training clips, so 2 epochs take 2 steps.",
    ):
        assert any(warning.startswith(text) for warning in warnings), (text, warnings)


def test_leaks_are_said_and_strict_refuses_them(clips, tmp_path):
    data = tmp_path / "data"
    for subset in ("train", "test"):
        for label in COLOURS:
            shutil.copytree(clips / label, data / subset / label)
    facts = {"path_to_data": str(data), "working_directory": tmp_path / "runs", **SCRATCH, "epochs": 1}
    facts |= {"val_groups": "none", "test_groups": "none"}
    events = []
    train(settings(**facts), events.append)
    warnings = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    assert any("share 6 groups" in w for w in warnings)
    assert any("18 videos are in two subsets" in w for w in warnings)
    with pytest.raises(DataError, match="share 6 groups"):
        train(settings(**facts, strict=True))


def test_more_unreadable_videos_than_allowed_stop_the_run_before_it_starts(clips, pretrained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    for group in (2, 3, 4, 5):
        (data / "Red" / f"v_Red_g{group:02d}_c01.avi").write_text("text")
    facts = {"path_to_data": str(data), "hf_model_name": str(pretrained)}
    facts["working_directory"] = tmp_path / "runs"
    with pytest.raises(DataError, match=r"4 of 18 videos cannot be read.*allows 3"):
        run(**facts)
    assert not (tmp_path / "runs").exists()
    run(**facts, max_bad="25%", epochs=1)


def test_the_official_split_decides_what_is_trained_on(trained, clips, tmp_path):
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
        "path_to_data": str(data), "val_groups": "none", "test_groups": "none", "epochs": 1,
        "test_at_end": True,
    }  # fmt: skip
    for split, tested in ((1, 3), (3, 9)):
        result = trained(**facts, split=split)
        assert result.test is not None and result.test.metrics["videos"] == tested
        assert sum(r["kind"] == "step" for r in records(result, "step")) == -(-(18 - tested) // 4)


def test_a_frame_store_beside_the_videos_is_found_used_and_scored(clips, pretrained, tmp_path):
    data = tmp_path / "colours"
    shutil.copytree(clips, data)
    facts = {"path_to_data": str(data), "hf_model_name": str(pretrained), "frame_grid": 6}
    facts |= {"working_directory": tmp_path / "runs", "epochs": 6, "test_at_end": True}
    from_videos = run(**facts)
    extract(ExtractSettings(path_to_data=str(data), num_workers=0, frames_per_video=6), lambda event: None)
    events = []
    from_store = train(settings(**facts), events.append)
    assert any("Frames are read from" in e.text for e in events if isinstance(e, Note))
    losses = [[r["train_loss"] for r in records(result)] for result in (from_videos, from_store)]
    # the same frames, as JPEG
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.1)
    assert from_store.test is not None and from_store.test.metrics["videos"] == 3
    written = json.loads((from_store.run / "eval" / "test" / "metrics.json").read_text())
    assert written["frames"] == "frame store"
    with pytest.raises(CheckpointError, match="frames"):
        train(settings(**facts, resume_from_checkpoint=str(from_videos.run / "checkpoints" / "step-000003")))
