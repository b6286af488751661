"""`tvit predict`: labels for videos, from the command line."""

import contextlib
import csv
import io
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import entry
import numpy as np
import pytest
import torch
from loopback import serving
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import change_weights

import tvit_cli
from tvit_cli import cli, commands
from tvit_cli.console import Console
from tvit_cli.data import video
from tvit_cli.data.clips import _begin_worker, hold_signals, later_interrupt
from tvit_cli.data.video import read_clip
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.evaluate import evaluate, scoring
from tvit_cli.engine.predict import predict, predict_timelines, timeline, write_embeddings
from tvit_cli.engine.predict.paths import find_videos
from tvit_cli.errors import DataError, ModelError, RunError, SettingsError, VideoError
from tvit_cli.model import linear
from tvit_cli.model.folder import load_model
from tvit_cli.results import Note, Progress, silent
from tvit_cli.settings.base import load
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.predict import PredictSettings


@pytest.fixture(scope="module")
def trained(classifier):
    return classifier


@pytest.fixture(scope="module")
def clip(trained):
    return next(trained.run.parents[1].glob("colours/Red/*_g06_*"))


def tvit(trained, *arguments):
    with contextlib.chdir(trained.run.parents[1]):
        return entry.tvit("predict", *arguments)


def test_scores_that_overflow_are_an_error_and_never_nan(trained, clip, tmp_path):
    shutil.copytree(trained.model, tmp_path / "model")
    huge = {"classifier.weight": torch.full((3, 16), 3e38), "norm.weight": torch.full((16,), 1e30)}
    change_weights(tmp_path / "model", **huge)
    data = trained.run.parents[1] / "colours"
    said = rf"{re.escape(str(tmp_path / 'model'))}: the weights overflow: scores are NaN or infinite"
    ended = tvit(trained, clip, "--model", tmp_path / "model", "--json", "--device", "cpu")
    assert ended.code == 2 and not ended.out and re.search(said, ended.err)
    model = tvit_cli.load_model(tmp_path / "model", device="cpu")
    for ask in (
        lambda: model.timeline(clip, window=0.1),
        lambda: model.explain(clip),
        lambda: model.embed([clip]),
        lambda: evaluate(
            EvalSettings(
                model=tmp_path / "model", path_to_data=str(data), subset="all", num_workers=0, device="cpu"
            )
        ),
    ):
        with pytest.raises(ModelError, match=said):
            ask()


def test_the_number_format_of_a_prediction_can_be_chosen(trained, clip):
    def scores(**how):
        model = tvit_cli.load_model(trained.model, device="cpu", **how)
        labels = [value for _, value in model.predict(clip).labels]
        return [*labels, model.timeline(clip, window=0.1).scores.max(), *model.embed([clip])[0].tolist()]

    whole, half = scores(), scores(mixed_precision="bf16")
    assert scores(mixed_precision="no") == whole
    assert half == pytest.approx(whole, abs=0.05)
    assert all(a != b for a, b in zip(half[:4], whole[:4], strict=True))
    facts = {"paths": [str(clip)], "model": trained.model, "device": "cpu"}
    typed = [
        predict(PredictSettings(**facts, mixed_precision=precision)).predictions[0].labels[0][1]
        for precision in ("no", "bf16")
    ]
    assert typed == [whole[0], half[0]]
    explained = tvit_cli.load_model(trained.model, device="cpu", mixed_precision="bf16").explain(clip)
    assert explained.score == pytest.approx(half[0], rel=1e-6)
    with pytest.raises(SettingsError, match="--int8: not with --mixed-precision bf16"):
        load(PredictSettings, flags={"paths": ["a.mp4"], "int8": True, "mixed_precision": "bf16"}, environ={})


def test_a_clip_is_labelled_with_nothing_else_said_but_a_clamped_top_k(trained, clip):
    result = tvit(trained, str(clip), "--top-k", "2")
    assert result.code == 0, result.err
    assert "Red" in result.out.splitlines()[1]
    assert len(result.out.strip().splitlines()) == 3  # a heading and two labels
    result = tvit(trained, str(clip), "--top-k", "50")
    assert result.code == 0
    assert "--top-k 50" in result.err
    assert "--top-k" not in tvit(trained, str(clip)).err  # the default


def test_json_lines_are_the_same_bytes_from_run_to_run(trained):
    first, second = (tvit(trained, "colours", "--json", "-q") for _ in range(2))
    assert first.out == second.out and first.code == 0
    answers = [json.loads(line) for line in first.out.splitlines()]
    assert len(answers) == 18
    assert {"label", "score"} == answers[0]["predictions"][0].keys()
    right = sum(a["predictions"][0]["label"] in a["video"] for a in answers)
    assert right >= 15


def test_predict_reports_a_broken_clip_and_predicts_the_rest(trained, clip, tmp_path):
    (tmp_path / "text.avi").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    result = tvit(trained, str(tmp_path / "text.avi"), str(clip), str(tmp_path / "empty.mp4"), "--json")
    assert result.code == 1
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert ["error" in a for a in answers] == [True, False, True]
    assert "2 of 3 videos could not be read" in result.err
    assert "Traceback" not in result.err


def test_predictions_are_the_evaluations(trained, clip):
    from tvit_cli.engine.evaluate import evaluate
    from tvit_cli.settings.eval import EvalSettings

    result = evaluate(EvalSettings(model=trained.model, num_workers=0, device="cpu"))
    rows = [line.split(",") for line in (result.output / "scores.csv").read_text().splitlines()]
    by_name = {row[0]: dict(zip(rows[0][3:], row[3:], strict=True)) for row in rows[1:]}
    for name, scores in by_name.items():
        path = trained.run.parents[1] / "colours" / name
        settings = PredictSettings(paths=(path,), model=trained.model, top_k=3, device="cpu")
        for label, score in predict(settings).predictions[0].labels:
            assert score == pytest.approx(float(scores[label]), abs=2e-6)


def test_8_bits_give_the_same_labels_with_scores_that_differ_a_little(trained, monkeypatch):
    def answers(**chosen):
        clips = trained.run.parents[1] / "colours"
        settings = PredictSettings(paths=(str(clips),), model=trained.model, top_k=3, device="cpu", **chosen)
        return [dict(prediction.labels) for prediction in predict(settings).predictions]

    monkeypatch.setattr(linear, "is_fast", lambda: True)
    whole, rounded = answers(), answers(int8=True)
    assert len(whole) == 18 and whole != rounded
    assert [max(a, key=a.__getitem__) for a in whole] == [max(a, key=a.__getitem__) for a in rounded]
    for a, b in zip(whole, rounded, strict=True):
        assert b == pytest.approx(a, abs=0.03)


def test_8_bits_are_left_out_where_slower_and_refused_elsewhere(trained, clip, monkeypatch):
    monkeypatch.setattr(linear, "is_fast", lambda: False)
    said = []
    facts = {"paths": (str(clip),), "model": trained.model, "device": "cpu"}
    whole, asked = (predict(PredictSettings(**facts, int8=chosen), said.append) for chosen in (False, True))
    assert whole.predictions == asked.predictions
    warnings = [event.text for event in said if isinstance(event, Note) and event.level == "warning"]
    assert warnings == ["--int8: int8 matmul is slower than float32 on this CPU; using float32."]
    monkeypatch.setattr("tvit_cli.engine.predict.model.pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(SettingsError, match=r"--int8: runs on CPUs only.*is cuda.*--device cpu"):
        predict(PredictSettings(paths=(str(clip),), model=trained.model, int8=True))


def test_folders_stand_for_the_videos_below_them_not_for_leftovers(tmp_path, trained):
    found = find_videos([trained.run.parents[1] / "colours" / "Red"])
    assert len(found) == 6 and found == sorted(found)
    with pytest.raises(DataError, match="no video in this folder"):
        find_videos([tmp_path])
    with pytest.raises(DataError, match="no such file"):
        find_videos([tmp_path / "nowhere.avi"])
    for name in ("a.mp4", "._a.mp4", "__MACOSX/a.mp4", ".b/c.mp4", "d/e.mp4", "d/.f.mp4"):
        (tmp_path / ".hidden" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".hidden" / name).touch()
    root = tmp_path / ".hidden"  # where it lies itself does not count
    assert find_videos([root]) == [root / "a.mp4", root / "d" / "e.mp4"]


def test_without_any_model_it_says_to_train_first(tmp_path, clip):
    with pytest.raises(ModelError, match="train"):
        predict(PredictSettings(paths=(clip,), working_directory=tmp_path / "none"))


def test_predicting_imports_neither_peft_nor_accelerate_nor_transformers(trained, clip):
    code = (
        "import sys; from pathlib import Path\n"
        "from tvit_cli.engine.predict import predict\n"
        "from tvit_cli.settings.predict import PredictSettings\n"
        "predict(PredictSettings(paths=(Path(sys.argv[1]),), model=Path(sys.argv[2])))\n"
        "heavy = {'transformers', 'accelerate', 'peft', 'wandb', 'huggingface_hub', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(clip), str(trained.model)], check=True)


def test_patterns_that_the_shell_left_alone_are_expanded(trained, tmp_path):
    root = trained.run.parents[1]
    found = find_videos([str(root / "colours" / "R*" / "*_g0[12]_*.avi")])
    assert [path.name for path in found] == ["v_Red_g01_c01.avi", "v_Red_g02_c01.avi"]
    assert len(find_videos([str(root / "colours" / "**")])) == 18  # folders and their files, each once
    odd = tmp_path / "what[1]?.avi"
    odd.write_bytes(found[0].read_bytes())
    assert find_videos([str(odd)]) == [odd]
    with pytest.raises(DataError, match="no file matches"):
        find_videos([str(tmp_path / "*.mkv")])
    with pytest.raises(DataError, match="an empty name"):
        find_videos(["", str(odd)])
    with pytest.raises(DataError, match=r"http://\[::1/a\.avi: is no URL"):
        find_videos(["http://[::1/a.avi"])


def test_a_list_on_stdin_is_read_and_csv_has_a_row_per_label(trained, clip, monkeypatch, capsys):
    other = clip.parents[1] / "Blue" / "v_Blue_g01_c01.avi"
    flags = {"paths": ["-"], "model": str(trained.model), "csv": True, "top_k": 2}
    loaded = load(PredictSettings, flags=flags, environ={})
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{clip}\n\n{other}\n"))
    commands.predict(loaded, Console("quiet"))
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["video"] for row in rows] == [str(clip)] * 2 + [str(other)] * 2
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]
    assert rows[0]["label"] == "Red" and float(rows[0]["score"]) > float(rows[1]["score"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(DataError, match="stdin is empty"):
        commands.predict(loaded, Console("quiet"))


def test_a_url_gets_the_scores_of_the_file_that_it_serves(trained, clip):
    model = tvit_cli.load_model(trained.run, device="cpu")
    with serving() as server:
        url = server.add("/videos/clip.avi", clip.read_bytes())
        assert model.predict(url).labels == model.predict(clip).labels
        with pytest.raises(VideoError, match=r"nowhere.avi: cannot be fetched and read \(.*404"):
            model.predict(f"{server.base}/nowhere.avi")
        gone = server.base
    (answer,) = model.predict_many([f"{gone}/clip.avi"])
    assert "refused" in answer.error and answer.label == ""


def test_a_playlist_from_the_network_reads_no_file_of_this_machine(trained, clip):
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{clip}\n#EXT-X-ENDLIST\n"
    with serving() as server:
        (answer,) = tvit_cli.load_model(trained.model).predict_many([server.add("/list.m3u8", text.encode())])
    assert answer.error


def test_predict_refuses_json_with_csv_and_timeline_options_alone():
    for flags, said in (
        ({"json_lines": True, "csv": True}, "Take one"),
        ({"stride": "1s"}, "Add --window"),
        ({"window": "1s", "embeddings": "a.safetensors"}, "Leave out --window"),
        ({"explain": "a.png", "int8": True}, "Leave out --int8"),
        ({"annotate": "a.txt"}, "should end in .mp4 or .mov or .mkv"),
        ({"explain": "b.avi"}, "--explain b.avi: its name should end in .png"),
        ({"embeddings": "b.avi"}, "--embeddings b.avi: its name should end in .safetensors"),
        ({"window": "0.9ms"}, "--window: 0.9ms: it should be greater than or equal to 0.001"),
        ({"window": "2s", "stride": "0"}, "--stride: 0: it should be greater than or equal to 0.001"),
        ({"window": "two"}, "it should be a duration"),
    ):
        with pytest.raises(SettingsError, match=said):
            load(PredictSettings, flags={"paths": ["a.avi"], **flags}, environ={})
    assert PredictSettings(paths=("a",), window="500ms").window == 0.5  # type: ignore[arg-type]


def test_the_api_is_lazy_and_answers_as_the_verb_does(trained, clip):
    code = "import sys, tvit_cli; assert not {'torch', 'av', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lead_model'"):
        _ = tvit_cli.lead_model
    model = tvit_cli.load_model(str(trained.run))
    assert model.labels == ("Blue", "Green", "Red")
    (answer,) = predict(PredictSettings(paths=(str(clip),), model=trained.model, top_k=2)).predictions
    assert model.predict(str(clip), top_k=2) == answer
    assert len(model.predict(clip, top_k=99).labels) == 3
    with pytest.raises(DataError, match="stands for 6 videos"):
        model.predict(clip.parent)
    model = tvit_cli.load_model(trained.model, device="cpu")
    for name in (clip, str(clip)):
        assert [found.video for found in model.predict_many(name)] == [str(clip)]
    assert len(model.predict_many(str(clip.parent))) == 6


def test_odd_files_are_predicted_or_named(trained, tmp_path, make_video):
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 8000, Fraction(1, 8000), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    gif = make_video(tmp_path / "a.gif", frames=5, codec="gif", pixel_format="rgb8")
    one = make_video(tmp_path / "one.avi", frames=1)
    tall = make_video(tmp_path / "tall.mp4", frames=4, height=96, width=48)
    answers = tvit_cli.load_model(trained.model).predict_many([gif, one, tall, sound])
    assert [bool(a.label) for a in answers] == [True, True, True, False]
    assert "only audio" in answers[3].error


def test_the_example_of_the_api_runs(trained, clip, monkeypatch, capsys):
    example = Path(__file__).parents[1] / "examples" / "python_api.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(trained.run), str(clip), str(clip.parent)])
    runpy.run_path(str(example), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 classes: Blue, Green, Red" and len(lines) == 1 + 7 + 1
    assert "Red" in lines[1] and lines[-1].strip().startswith("0.00 s to")


def test_embeddings_are_the_classifier_input_and_deterministic(trained, clip, tmp_path):
    again = tmp_path / "again.avi"
    again.write_bytes(clip.read_bytes())
    (tmp_path / "text.avi").write_text("no video")
    other = clip.parents[1] / "Blue" / "v_Blue_g01_c01.avi"
    paths = [clip, other, tmp_path / "text.avi", again]
    out = tmp_path / "new" / "out.safetensors"
    result = predict(
        PredictSettings(paths=tuple(map(str, paths)), model=trained.model, embeddings=out, device="cpu")
    )
    features = load_file(out)["features"]
    with safe_open(out, "pt") as file:
        names = json.loads(file.metadata()["names"])
    assert out.stat().st_mode == again.stat().st_mode  # as open as any file
    assert names == [str(clip), str(other), str(again)] and features.dtype == torch.float32
    assert features.shape == (3, 16)
    assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])
    twice = predict(
        PredictSettings(paths=(str(clip), str(other), str(clip)), model=trained.model, embeddings=out)
    )
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["names"]) == [p.video for p in twice.predictions]
        torch.testing.assert_close(file.get_tensor("features"), features[[0, 1, 0]])
    model, card = load_model(trained.model)
    for row, answer in zip(features, [p for p in result.predictions if p.labels], strict=True):
        scores = model.classifier(row).double().softmax(0)
        for label, score in answer.labels:
            assert scores[card.labels.index(label)].item() == pytest.approx(score, abs=1e-6)
    api = tvit_cli.load_model(trained.model, device="cpu")
    assert torch.allclose(api.embed([clip, other]), features[:2], atol=1e-6)
    with pytest.raises(VideoError, match=r"text.avi"):
        api.embed([tmp_path / "text.avi"])
    nothing = tmp_path / "nothing.safetensors"
    unread = PredictSettings(paths=(str(tmp_path / "text.avi"),), model=trained.model, embeddings=nothing)
    (answer,) = predict(unread).predictions
    assert "not a video" in answer.error and not nothing.exists()


def test_embeddings_that_cannot_be_written_leave_the_older_ones(tmp_path, monkeypatch):
    def cut_off(tensors, path, **how):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    out = tmp_path / "out.safetensors"
    rows = [("a.avi", torch.ones(3))]
    write_embeddings(out, rows, tmp_path)
    before = out.read_bytes()
    monkeypatch.setattr("tvit_cli.model.folder.save_file", cut_off)
    with pytest.raises(RunError, match=r"--embeddings .*out\.safetensors: cannot be written \(No space"):
        write_embeddings(out, rows, tmp_path)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def asked(trained, clip, **flags):
    facts = {"paths": [str(clip)], "model": str(trained.model), "device": "cpu", **flags}
    return load(PredictSettings, flags=facts, environ={}).settings


@pytest.mark.parametrize(
    ("option", "file", "sentence"),
    [
        ("annotate", "self.mp4", r"--annotate .*self\.mp4: is the video itself\. Name another file"),
        ("annotate", "link.mp4", r"--annotate .*link\.mp4: is the video itself"),
        ("annotate", "folder.mp4", r"--annotate .*folder\.mp4: is a folder, not a file"),
        ("annotate", "self.mp4/out.mp4", r"self\.mp4 is a file, not a folder"),
        ("embeddings", "self.mp4/new/x.safetensors", r"--embeddings .*self\.mp4 is a file, not a folder"),
        ("explain", "self.mp4/why.png", r"--explain .*self\.mp4 is a file, not a folder"),
        (
            "explain",
            "locked/new/why.png",
            r"--explain .*: no write permission in .*locked\. Name another folder",
        ),
        ("output", "self.mp4/times", r"--output .*self\.mp4 is a file, not a folder"),
        ("output", "locked/times", r"--output .*: no write permission in .*locked\. Name another folder"),
        ("output", "taken", r"--output .*taken: .*taken/self is a file, not a folder"),
    ],
)
def test_a_file_that_has_no_place_is_refused_before_a_model_is_opened(
    option, file, sentence, trained, clip, tmp_path, monkeypatch
):
    (tmp_path / "self.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "link.mp4").symlink_to(tmp_path / "self.mp4")
    for name in ("folder.mp4", "locked", "taken"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken" / "self").touch()
    there = os.access
    locked = tmp_path / "locked"  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and there(path, mode))
    monkeypatch.setattr("tvit_cli.engine.predict.open_model", None)
    monkeypatch.setattr("tvit_cli.engine.predict.open_model", None)
    for window in {"output": ("2s",), "annotate": (None, "2s")}.get(option, (None,)):
        settings = asked(trained, tmp_path / "self.mp4", window=window, **{option: str(tmp_path / file)})
        with pytest.raises(DataError, match=sentence):
            (predict_timelines if window else predict)(settings)


@pytest.mark.parametrize("option", ["embeddings", "explain", "annotate", "output"])
def test_a_disk_that_fills_meanwhile_does_not_cost_the_labels(
    option, trained, clip, tmp_path, monkeypatch, capsys
):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    suffix = {"embeddings": ".safetensors", "explain": ".png", "annotate": ".mp4", "output": ""}[option]
    window = ["--window", "100ms"] if option == "output" else []
    with pytest.raises(SystemExit) as stopped:
        cli.run(
            [
                "predict", str(clip), "--model", str(trained.model), f"--{option}",
                str(tmp_path / f"x{suffix}"), *window,
            ]
        )  # fmt: skip
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "No space left on device" in said.err
    assert "Red" in said.out and not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("window", [None, "2s"])
def test_how_much_of_a_labelled_video_is_written_is_told(trained, tmp_path, make_video, monkeypatch, window):
    video = make_video(tmp_path / "long.mp4", frames=40, rate=10)
    out = tmp_path / "out.mp4"
    flags = {"paths": [str(video)], "model": str(trained.model), "annotate": str(out)}
    settings = load(
        PredictSettings, flags=flags | ({"window": window} if window else {}), environ={}
    ).settings
    events = []
    if window:
        predict_timelines(settings, events.append)
    else:
        predict(settings, events.append)
    written = [event for event in events if isinstance(event, Progress) and event.task == "seconds written"]
    assert [(event.done, event.total) for event in written] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert isinstance(events[-1], Note) and str(out) in events[-1].text
    drawn = []
    monkeypatch.setattr(
        "tvit_cli.engine.predict.timeline.annotate", lambda path, place, segments, *_: drawn.extend(segments)
    )
    if window:
        (found,) = predict_timelines(settings, silent)
        assert found.timeline is not None and drawn == list(found.timeline.segments)
    else:
        (said,) = predict(settings, silent).predictions
        assert [(segment.label, segment.score) for segment in drawn] == [said.labels[0]]


def test_memory_that_runs_out_is_no_mistake_of_ours(trained, clip, monkeypatch, capsys):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr("tvit_cli.engine.predict.open_model", full)
    with pytest.raises(SystemExit) as stopped:
        cli.run(["predict", str(clip), "--model", str(trained.model)])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.strip() == "error: Out of memory."


def test_python_arguments_are_checked_as_on_the_command_line(trained, clip):
    model = tvit_cli.load_model(trained.model, device="cpu")
    with pytest.raises(SettingsError, match="device: gpu: it should be 'auto', 'cpu', 'cuda' or 'mps'"):
        tvit_cli.load_model(trained.model, device="gpu")
    with pytest.raises(SettingsError, match="top_k: 0: it should be greater than or equal to 1"):
        model.predict(clip, top_k=0)
    with pytest.raises(SettingsError, match=r"^batch_size: 0: it should be greater"):
        model.embed([clip], batch_size=0)
    for name, value in (("window", 0), ("window", -2), ("stride", 0), ("smoothing", -1)):
        with pytest.raises(SettingsError, match=f"^{name}: {value}: it should be greater than or equal to 0"):
            model.timeline(clip, **{name: value})


WINDOWS = ["--window", "0.2", "--stride", "0.04", "--smoothing", "0"]


def predict_while(act, monkeypatch, trained, paths, *options, batch_size=2):
    """Run the command; `act(calls, flushed)` before each forward pass, with all that was flushed to stdout."""

    calls = itertools.count(1)
    for module in (scoring, timeline):

        def transform(*arguments, really=module.eval_transform, **keywords):
            act(next(calls), getattr(sys.stdout, "flushed", ""))
            return really(*arguments, **keywords)

        monkeypatch.setattr(module, "eval_transform", transform)
    model = ("--model", trained.model, "--device", "cpu", "--per-gpu-batch-size", batch_size)
    return entry.tvit("predict", *paths, *model, *options)


@pytest.mark.parametrize("form", ["--json", "--csv", "--verbose"])
def test_answers_are_printed_and_flushed_after_each_batch(form, trained, clip, monkeypatch):
    seen = []
    ended = predict_while(
        lambda call, shown: seen.append(shown.count("/Red/")),
        monkeypatch, trained, [clip.parent], form, "--top-k", "1",
    )  # fmt: skip
    assert seen == [0, 1, 3, 5] and ended.out.count("/Red/") == 6 and ended.code == 0
    assert re.search(r"label +videos +below 0\.5\n(.*\n)*all +6 +\d", ended.out + ended.err)
    assert ("below" in ended.out) == (form == "--verbose")


@pytest.mark.parametrize("form", ["--json", "--csv", "--verbose"])
def test_segments_are_printed_and_flushed_once_certain(form, trained, clip, monkeypatch, tmp_path):
    other = clip.parents[1] / "Blue" / "v_Blue_g01_c01.avi"
    scenes = [read_clip(path, lambda count: range(count)).frames for path in (clip, other, clip)]
    write_video(film := tmp_path / "film.mp4", np.concatenate(scenes).repeat(3, 0))
    seen = []
    act = lambda call, shown: seen.append(len(re.findall("Red|Blue|Green", shown)))  # noqa: E731
    ended = predict_while(act, monkeypatch, trained, [film], form, *WINDOWS, batch_size=1)
    said = len(re.findall("Red|Blue|Green", ended.out))
    assert seen[0] == 0 and 1 <= seen[-1] < said and seen == sorted(seen)
    (found,) = predict_timelines(asked(trained, film, window="0.2", stride="0.04", smoothing="0"))
    assert found.timeline is not None and len(found.timeline.segments) == said
    if form == "--json":
        assert [s["end"] for s in json.loads(ended.out)["segments"]] == [
            s.end for s in found.timeline.segments
        ]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_keeps_the_answers_and_says_how_far_it_came(name, code, trained, clip, monkeypatch, tmp_path):
    def stop(call, shown):
        if call >= 3:
            signal.raise_signal(getattr(signal, name))

    rows = tmp_path / "rows.safetensors"
    ended = predict_while(stop, monkeypatch, trained, [clip.parent], "--json", "--embeddings", rows)
    found = [json.loads(line)["video"] for line in ended.out.splitlines()]
    assert found == list(map(str, sorted(clip.parent.iterdir())[:3]))
    assert ended.code == code and "Traceback" not in ended.err and len(load_file(rows)["features"]) == 3
    word = name.replace("SIGINT", "Ctrl-C")
    assert ended.err.rstrip().endswith(f"Stopped by {word} after 3 of 6 videos.")
    if name == "SIGINT":
        with pytest.raises(KeyboardInterrupt):  # in Python it is not caught
            tvit_cli.load_model(trained.model, device="cpu").predict_many([clip])


def test_a_stop_keeps_the_timeline_up_to_the_last_window(trained, clip, monkeypatch, tmp_path):
    def stop(call, shown):
        if call == 5:
            signal.raise_signal(signal.SIGINT)

    output = ("--output", tmp_path, "--json", "--window", "0.1")
    ended = predict_while(stop, monkeypatch, trained, [clip, clip], *output)
    first, second = map(json.loads, ended.out.splitlines())
    assert first["seconds"] > second["seconds"] == second["segments"][-1]["end"] > 0.1
    assert ended.code == 130 and f"after 1 of 2 videos, at {second['seconds']:.2f} s of {clip}." in ended.err
    whole, part = (
        len((tmp_path / f"{clip.stem}{n}" / "timeline.csv").read_text().splitlines()) for n in ("", "-2")
    )
    assert whole > part > 1


def test_a_decoding_process_prints_no_traceback_of_its_threads(capfd):
    def fail():
        _begin_worker(0)
        sys.excepthook(EOFError, EOFError(), None)  # as multiprocessing.resource_sharer does

    child = multiprocessing.get_context("fork").Process(target=fail)
    child.start()
    child.join()
    assert child.exitcode == 0 and capfd.readouterr().err == ""


def test_a_video_too_slow_to_decode_is_named_and_others_go_on(
    trained, clip, make_video, tmp_path, monkeypatch
):
    slow = make_video(tmp_path / "slow.mp4", frames=40)
    ticks = itertools.count()
    monkeypatch.setattr(video, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))
    ended = predict_while(lambda *_: None, monkeypatch, trained, [slow, clip], "--json", "--time-limit", "2")
    first, second = map(json.loads, ended.out.splitlines())
    assert first["error"].startswith(
        "decoding takes more than 2 s (--time-limit). Raise the limit, label parts"
    )
    assert second["predictions"] and ended.code == 1 and "1 of 2 videos could not be read" in ended.err


@pytest.mark.parametrize("hold", [later_interrupt, hold_signals])
def test_ctrl_c_while_decoding_processes_start_comes_after_it(hold):
    order, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), hold():
            signal.raise_signal(signal.SIGINT)
            order.append("started")
        assert order == ["started"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
