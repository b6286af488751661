"""Data sets as training reads them: layouts, unreadable videos, data leakage, frame stores."""

import json
import os
import shutil
import sys

import pytest
from entry import start
from tiny import COLOURS, last_weights, records, run, same, settings

from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.extract import extract
from tvit_cli.engine.train import train
from tvit_cli.errors import CheckpointError, DataError, RunError, VideoError
from tvit_cli.results import Note
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.extract import ExtractSettings


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


def test_leaks_are_said_and_strict_refuses_them(clips, tmp_path):
    data = tmp_path / "data"
    for subset in ("train", "test"):
        for label in COLOURS:
            shutil.copytree(clips / label, data / subset / label)
    facts = {
        "path_to_data": str(data), "hf_model_name": None, "width": 16, "depth": 1, "num_heads": 2,
        "epochs": 1,
    }  # fmt: skip
    facts |= {
        "working_directory": tmp_path / "runs", "val_groups": "none", "test_groups": "none", "train": "all",
    }  # fmt: skip
    events = []
    train(settings(**facts), events.append)
    warnings = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    assert any("share 6 groups" in w for w in warnings) and any(
        "18 videos are in two subsets" in w for w in warnings
    )
    with pytest.raises(DataError, match="share 6 groups"):
        train(settings(**facts, strict=True))


def test_more_unreadable_videos_than_allowed_stop_the_run_before_it_starts(clips, pretrained, tmp_path):
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
    facts = {
        "path_to_data": str(data),
        "hf_model_name": str(pretrained),
        "working_directory": tmp_path / "runs",
    }
    facts |= {"epochs": 6, "test_at_end": True, "frame_grid": 6}
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
