"""The Python API: verbs as functions with the settings, checks and results of the command line."""

import ast
import json
import os
import random
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from entry import run_python, tvit
from tiny import SCRATCH, make_model

import tvit_cli
from tvit_cli import api
from tvit_cli.data.video_writer import write_video
from tvit_cli.settings.train import TrainSettings

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "img_size": 32, "n_frames": 4, "epochs": 2, "per_gpu_batch_size": 4, "num_workers": 0, "device": "cpu",
    "learning_rate": 0.01, "top_k": 2, "val_groups": "1", "test_groups": "1", **SCRATCH,
}  # fmt: skip


@pytest.fixture
def train(clips, tmp_path):
    """`train(**changes)` on the shared clips, by the public function."""
    return lambda **changes: tvit_cli.train(path_to_data=clips, working_directory=tmp_path, **TINY | changes)


def test_python_trains_evaluates_predicts_and_exports(train, clips, tmp_path, capfd):
    events = []
    result = train(on_event=events.append, test_at_end=True, experiment_name="mine")
    assert result.run == tmp_path / "mine" and result.test.metrics["videos"] == 3
    assert [e.epoch for e in events if isinstance(e, tvit_cli.EpochDone)] == [1, 2]
    assert len(result.epochs) == 2 and result.report.is_file()

    quiet = {"quiet": True, "device": "cpu"}
    scores = tvit_cli.evaluate(result.model, subset="val", num_workers=0, **quiet)
    assert scores.metrics["video_top1"] == pytest.approx(result.best["val_video_top1"])
    assert set(scores.per_class) == {"Blue", "Green", "Red"} and scores.output == result.run / "eval" / "val"
    found = tvit_cli.predict(clips / "Red", model=result.model, top_k=np.int64(1), **quiet).predictions
    assert [len(p.labels) for p in found] == [1] * 6
    (timeline,) = tvit_cli.predict([found[0].video], model=result.model, window=0.1, **quiet)
    assert timeline.timeline.segments
    exported = tvit_cli.export(result.model, clips=clips / "Red", quiet=True)
    assert exported.output == result.run / "export" / "safetensors" and exported.parity.passed
    assert capfd.readouterr().out == ""


def test_other_results_of_train_and_extract_are_typed(train, clips, tmp_path):
    assert train(dry_run=True, quiet=True).trainable > 0
    assert set(train(seed=(0, 1), epochs=1, quiet=True).runs) == {"seed0-split1", "seed1-split1"}
    scans = tvit_cli.extract(path_to_data=clips, check=True, num_workers=0, quiet=True)
    assert len(scans) == 18 and scans[0].frames == 6
    assert (
        tvit_cli.extract(path_to_data=clips, output=tmp_path / "store", num_workers=0, quiet=True).videos
        == 18
    )


def test_train_reports_epochs_without_a_callback(train, capfd):
    train(epochs=1)
    assert "epoch   1 loss" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("verb", "given", "text"),
    [
        ("train", {"epoch": 3}, "epoch: unknown setting. Did you mean epochs?"),
        ("train", {"lr": 1}, "lr: unknown setting. Did you mean learning_rate?"),
        ("train", {"epochs": 0}, "epochs: 0: it should be greater than or equal to 1."),
        ("train", {"warmup_epochs": 2, "epochs": 1}, "--warmup-epochs 2: it should be at most --epochs 1"),
        ("train", {"preset": "quick"}, "--preset quick: no such preset. Did you mean quickstart?"),
        ("train", {"show_settings": True}, "show_settings: changes the output of the command line only."),
        ("train", {"num_processes": 2}, "num_processes: 2: a call from Python runs in its own process."),
        ("evaluate", {"model": "nowhere"}, "nowhere: no such model folder."),
        ("predict", {"paths": np.zeros((2, 2, 2, 3))}, "paths: ndarray: it should be the name of a video"),
        ("predict", {"paths": "a.mp4", "json_lines": True}, "json_lines: changes the output"),
        ("export", {"format": "onx"}, "format: onx: it should be"),
        ("download", {"name": "ucf11"}, "ucf11"),
    ],
)  # fmt: skip
def test_python_refuses_settings_as_the_command_line_does(verb, given, text):
    with pytest.raises(tvit_cli.TvitError) as error:
        getattr(tvit_cli, verb)(**given)
    assert text in str(error.value)


@pytest.mark.parametrize("verb", ["download", "extract", "train", "eval", "predict", "export"])
def test_the_command_line_calls_the_functions_of_the_api(verb, monkeypatch):
    def called(loaded, report):
        raise tvit_cli.RunError("from the API")

    name = {"eval": "evaluate"}.get(verb, verb)
    monkeypatch.setattr(api, f"run_{name}", called)
    ended = tvit(verb, *{"download": ["motions"], "predict": ["a.mp4"]}.get(verb, []))
    assert ended.code == 1 and "from the API" in ended.err


def state():
    """Global state that a training might change."""
    return {
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)],
        "threads": (torch.get_num_threads(), threading.active_count()),
        "torch": (torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled()),
        "others": (random.getstate(), np.random.get_state()[1].tolist(), Path.cwd(), torch.is_grad_enabled()),
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
    }  # fmt: skip


def test_train_leaves_no_global_state_and_runs_again(train):
    train(epochs=1, quiet=True)  # imports what a training needs
    before = state()
    first, second = train(quiet=True), train(quiet=True)
    assert state() == before
    assert first.run != second.run and first.best == second.best


def test_train_and_predict_work_in_a_thread(train, clips):
    results = []

    def work():
        results.append(train(epochs=1, quiet=True))
        results.append(tvit_cli.load_model(results[0].model, device="cpu").predict_many(clips / "Red"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].model.is_dir() and len(results[1]) == 6


def interrupt(event):
    raise KeyboardInterrupt


def press(event):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("stop", [interrupt, press])
def test_ctrl_c_in_python_keeps_the_run_and_resumes(train, stop):
    def on_event(event):
        if isinstance(event, tvit_cli.EpochDone):
            stop(event)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        tvit_cli.Interrupted, match=r"Stopped by Ctrl-C after step 3 of 6; all is saved"
    ) as stopped:
        train(on_event=on_event, experiment_name="stopped")
    assert signal.getsignal(signal.SIGINT) is before and stopped.value.exit_code == 130
    resumed = train(experiment_name="stopped", resume_from_checkpoint="latest", quiet=True)
    assert resumed.best == train(quiet=True).best


def test_importing_tvit_loads_nothing_and_lists_the_public_names():
    code = (
        "import sys, tvit_cli; loaded = {'torch', 'numpy', 'pydantic', 'rich'} & sys.modules.keys(); assert not loaded, "
        "loaded; assert {*tvit_cli.__all__} == {*dir(tvit_cli)}"
    )
    assert run_python("-c", code) == (0, "", "")


@pytest.mark.parametrize(
    "path", [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")], ids=lambda path: path.name
)
def test_examples_use_public_names_of_tvit_only(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    used = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names if alias.name.startswith("tvit_cli.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tvit_cli"):
            used |= {a.name if node.module == "tvit_cli" else f"{node.module}.{a.name}" for a in node.names}
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "tvit_cli"
        ):
            used.add(node.attr)
    assert used <= {*tvit_cli.__all__}


def test_help_and_completion_know_the_settings():
    parameters = api.inspect.signature(tvit_cli.train).parameters
    assert parameters["epochs"].default == 300 and "show_settings" not in parameters
    assert "    epochs: Passes over the training videos." in tvit_cli.train.__doc__
    assert len(parameters) == len(TrainSettings.model_fields) - 1 + 4


# Frames in memory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tvit_cli.load_model(
        make_model(tmp_path_factory.mktemp("model") / "model", ("a", "b", "c")), device="cpu"
    )


@pytest.fixture(scope="module")
def frames():
    """Noise, larger than the model's frames, of 40 frames in an odd size."""
    return np.random.default_rng(0).integers(0, 256, (40, 90, 121, 3), dtype=np.uint8)


@pytest.mark.parametrize(("suffix", "codec", "form"), [("avi", "rawvideo", "bgr24"), ("mkv", "ffv1", "bgr0")])
def test_frames_in_memory_are_answered_as_the_same_frames_in_a_file(
    suffix, codec, form, model, frames, tmp_path
):
    path = tmp_path / f"lossless.{suffix}"
    write_video(path, frames, rate=10, codec=codec, pixel_format=form)
    shown, fps = tvit_cli.read_video(str(path))
    assert np.array_equal(shown, frames) and fps == pytest.approx(10)
    array, file = model.predict(frames, fps=10, top_k=3), model.predict(path, top_k=3)
    assert array.labels == file.labels and array.video == "array of 40 frames"
    both = model.predict_many([path, frames, frames[:, :, ::-1]], top_k=3)
    assert both[0].labels == both[1].labels != both[2].labels
    assert torch.equal(*model.embed([path, frames]))
    assert torch.equal(model.explain(frames).relevance, model.explain(path).relevance)
    a, b = (model.timeline(v, fps=10, window=1.0) for v in (frames, path))
    assert np.array_equal(a.scores, b.scores) and a.seconds == pytest.approx(b.seconds) == 4.0
    assert [s.label for s in a.segments] == [s.label for s in b.segments]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x / 255, r"float64 \(40, 90, 121, 3\): they should be uint8 \(T, H, W, 3\), .*Take \(255 \* frames"),
        (lambda x: x.transpose(0, 3, 1, 2), r"uint8 \(40, 3, 90, 121\): .*Take frames.transpose\(0, 2, 3, 1\)"),
        (lambda x: x[0], r"uint8 \(90, 121, 3\): .*numpy.stack\(frames\)"),
        (lambda x: x[:0], r"uint8 \(0, 90, 121, 3\): they should be"),
        (lambda x: x.astype(int), r"int64 .*they should be uint8"),
        (lambda x: list(x), r"list: neither a path nor a URL"),
        (lambda x: np.zeros((2, 2, 200, 3), np.uint8), r"array of 2 frames: .*200"),
    ],
)  # fmt: skip
def test_frames_of_another_form_are_refused_by_name(change, text, model, frames):
    for work in (model.predict, model.timeline):
        with pytest.raises(tvit_cli.DataError, match=text):
            work(change(frames))


@pytest.mark.parametrize("fps", [0, -1, float("nan"), "25"])
def test_a_rate_that_is_none_is_refused(fps, model, frames):
    for work in (model.predict, model.timeline):
        with pytest.raises(tvit_cli.DataError, match=r"fps: .*it should be a number above 0"):
            work(frames, fps=fps)


def test_a_model_draws_annotates_and_gives_its_input_frames(model, frames, tmp_path):
    why, timeline = model.explain(frames), model.timeline(frames, fps=10, window=1.0)
    assert model.input_frames(why).shape == (4, 32, 32, 3) and "the map is" in why.deletion.verdict
    pictures = (
        model.draw_explanation(why),
        model.draw_timeline(timeline),
        model.draw_timeline(timeline, dark=True),
    )
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and len({*pictures}) == 3
    model.annotate(str(tmp_path / "a.mp4"), frames, timeline.segments, fps=10)
    assert tvit_cli.read_video(tmp_path / "a.mp4")[0].shape == (40, 90, 120, 3)
    with pytest.raises(tvit_cli.SettingsError, match=r"a.txt: its name should end in .mp4"):
        model.annotate(tmp_path / "a.txt", frames, timeline.segments)


def test_load_model_opens_the_newest_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tvit_cli.ModelError, match="working_directory"):
        tvit_cli.load_model()
    make_model(tmp_path / "working_directory" / "mine" / "model", ("a", "b"))
    assert tvit_cli.load_model(device="cpu").labels == ("a", "b")


def test_a_script_without_a_main_guard_checks_videos_once(clips, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, tvit_cli\nprint('once')\n"
        f"print(len(tvit_cli.extract(path_to_data={str(clips)!r}, check=True, num_workers=1, quiet=True)))\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    assert run_python(script).out == "once\n18\nPASSIVE\n"
