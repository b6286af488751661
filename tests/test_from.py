"""`tvit train --from`: weights, classes, settings and held-out groups of an earlier run."""

import json
import shutil

import pytest
import torch
from entry import tvit
from tiny import SCRATCH, last_weights, records, run, same, settings

from tvit_cli.data.layout import HeldOut, read_layout
from tvit_cli.engine.evaluate.metrics import video_metrics
from tvit_cli.engine.train import set_up, train
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.errors import CheckpointError, DataError, ModelError, SettingsError
from tvit_cli.files import files_below
from tvit_cli.model.folder import load_card, load_model
from tvit_cli.results import silent
from tvit_cli.settings.base import Layer, load
from tvit_cli.settings.train import TrainSettings


@pytest.fixture
def go_on(finished, clips, tmp_path):
    """`go_on(**changes)`: settings of a run that goes on from `finished`."""
    own = {"path_to_data": str(clips), "working_directory": tmp_path, "from_": str(finished.run)}
    return lambda **changes: settings(**{**own, **changes})


@pytest.fixture
def other_classes(clips, tmp_path):
    """The shared clips without Blue, with Red as `red`, and with a class Pink in groups of its own."""
    root = tmp_path / "other"
    shutil.copytree(clips / "Green", root / "Green")
    shutil.copytree(clips / "Red", root / "red")
    (root / "Pink").mkdir()
    for path in (clips / "Red").iterdir():
        shutil.copy(path, root / "Pink" / path.name.replace("Red_g", "Pink_g9"))
    return root


def test_classifier_rows_of_known_classes_are_kept_by_name(go_on, finished, other_classes):
    loop = set_up(go_on(path_to_data=str(other_classes)), silent)
    fresh = set_up(
        go_on(path_to_data=str(other_classes), from_=None, hf_model_name=str(finished.run)), silent
    )
    before, labels = load_model(finished.model)[0].classifier, load_card(finished.model).labels
    now, anew = loop.plain_model.classifier, fresh.plain_model.classifier
    assert (loop.source.layout.labels, labels) == (("Green", "Pink", "red"), ("Blue", "Green", "Red"))
    for own, theirs in ((0, 1), (2, 2)):
        assert torch.equal(now.weight[own], before.weight[theirs])
        assert torch.equal(now.bias[own], before.bias[theirs])
    assert torch.equal(now.weight[1], anew.weight[1]) and not torch.equal(now.weight[0], anew.weight[0])


@pytest.mark.parametrize(
    "facts",
    [{}, {"feature_norm": True, "lora_use_dora": True}, {"train": "last-1", "attention": "divided"}, SCRATCH],
    ids=["lora", "dora", "last-1", "scratch"],
)
def test_continuation_validates_as_its_source_before_a_step(inputs, tmp_path, facts):
    before = run(**{**inputs, "working_directory": tmp_path, "epochs": 1, **facts})
    own = {k: v for k, v in facts.items() if k not in ("hf_model_name", "width", "depth", "num_heads")}
    own |= {"path_to_data": inputs["path_to_data"], "working_directory": tmp_path, "lora_rank": 2}
    loop = set_up(settings(from_=str(before.run), **own), silent)
    scores = loop.score(loop.source.readable("val"), "validating")
    found = video_metrics(scores.logits, scores.labels, top_k=2)
    assert found["video_top1"] == before.best["val_video_top1"]
    assert found["loss"] == pytest.approx(before.best["val_loss"], abs=1e-5)


def test_train_from_takes_over_settings_and_typed_ones_win(finished, clips, tmp_path):
    before = {name: (finished.run / name).read_bytes() for name in files_below(finished.run)}
    words = ["train", "--from", finished.run, "--working-directory", tmp_path, "--device", "cpu"]
    ended = tvit(*words, "--epochs", 1, "--experiment-name", "more", "--num-workers", 0, "--frame-grid", 6)
    assert ended.code == 0, ended.err
    said = f"{finished.run}: weights, 4 frames of 32 px, of 6 evenly spaced ones; 3 of 3 classes"
    assert said in ended.err and said in (tmp_path / "more" / "report.html").read_text()
    own = json.loads((tmp_path / "more" / "settings.json").read_text())
    assert (own["n_frames"], own["per_gpu_batch_size"], own["epochs"], own["frame_grid"]) == (4, 4, 1, 6)
    assert (own["path_to_data"], own["hf_model_name"], own["from_"]) == (str(clips), None, str(finished.run))
    card, earlier = load_card(tmp_path / "more" / "model"), load_card(finished.model)
    assert (card.base.name, card.base.sha256) == (str(finished.run), earlier.weights_sha256)
    assert card.held_out == earlier.held_out
    assert before == {name: (finished.run / name).read_bytes() for name in files_below(finished.run)}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"temporal_rate": "0.5"}, {"temporal_rate": 0.5, "attention": "factorized"}),
        ({"attention": "joint"}, {"attention": "joint", "temporal_depth": None}),
        ({"epochs": "3"}, {"epochs": 3, "warmup_epochs": None}),
    ],
)
def test_settings_taken_over_yield_to_typed_ones_they_contradict(typed, expected):
    taken = {"attention": "factorized", "temporal_depth": 3, "warmup_epochs": 5.0, "epochs": 20}
    flags = {"from_": "mine", **typed}
    own = load(TrainSettings, flags=flags, environ={}, beneath=lambda _: Layer("from mine", taken)).settings
    assert {name: getattr(own, name) for name in expected} == expected


def test_run_from_another_resumes_to_the_same_bits_without_it(go_on, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished.run, copy)
    facts = {"from_": str(copy), "lora_init": "pissa"}
    whole = train(go_on(**facts))
    half = train(go_on(**facts, experiment_name="half"))
    shutil.rmtree(list_checkpoints(half.run / "checkpoints")[-1])
    shutil.rmtree(half.model)
    shutil.rmtree(copy)
    with pytest.raises(CheckpointError, match=r"--from: .* -> .*mine"):
        train(go_on(**facts | {"from_": str(finished.run)}, experiment_name="half"))
    again = train(go_on(**facts, experiment_name="half"))
    assert same(last_weights(again), last_weights(whole)) and records(again) == records(whole)
    with pytest.raises(ModelError, match=r"--from .*copy: no such run in .* Runs there: .*half"):
        train(go_on(**facts, experiment_name="new"))


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"pool": "mean"}, ModelError, "--pool mean: the model of --from .* was trained with class"),
        ({"hf_model_name": "x"}, SettingsError, "--hf-model-name x: --from .* has other weights"),
        ({"width": 4}, ModelError, "--width 4: the model of --from .* was trained with 16. Leave it out"),
        ({"val_groups": "05", "strict": True}, DataError, "trained on 3 val or test videos"),
        ({"overwrite": True, "experiment_name": "mine"}, SettingsError, "holds the weights .* --from"),
        ({"from_": "SERIES"}, ModelError, r"a series .*seed0-split1 0\.\d+, seed1-.*Name one run, such as"),
        ({"from_": "VIT"}, ModelError, "no model that tvit trained.*--hf-model-name"),
    ],
)
def test_train_from_refuses(changes, error, sentence, go_on, finished, pretrained, tmp_path):
    if changes.get("from_") == "SERIES":
        for seed in (0, 1):
            shutil.copytree(finished.model, tmp_path / "people" / f"seed{seed}-split1" / "model")
    names = {"SERIES": str(tmp_path / "people"), "VIT": str(pretrained)}
    changes = {**changes, **({"from_": names[changes["from_"]]} if "from_" in changes else {})}
    if "experiment_name" in changes:
        changes["working_directory"] = finished.run.parent
    with pytest.raises((error, ValueError), match=sentence):
        train(go_on(**changes))


def test_series_goes_on_from_a_run_by_its_name(go_on, finished, tmp_path):
    shutil.copytree(finished.run, tmp_path / "mine")
    own = go_on(from_="mine", experiment_name="seed1-split1", working_directory=tmp_path / "people")
    assert set_up(own, silent).built.origin.folder == tmp_path / "mine" / "model"


def test_train_from_an_unfinished_run_says_to_resume_it(go_on, finished, tmp_path):
    (tmp_path / "cut").mkdir()
    shutil.copy(finished.run / "settings.json", tmp_path / "cut")
    with pytest.raises(ModelError, match=r"has not ended.*--resume-from-checkpoint .*cut"):
        train(go_on(from_="cut"))


def test_finished_run_asked_for_more_epochs_names_the_command(finished, inputs):
    command = rf"tvit train --from {finished.run} --epochs 3 --experiment-name mine-2 --working-directory"
    facts = {**inputs, "working_directory": finished.run.parent, "epochs": 5}
    with pytest.raises(SettingsError, match=rf"mine is finished\..*\n.*3 more epochs:\n  {command}"):
        run(**facts, experiment_name="mine")
    with pytest.raises(CheckpointError, match=command):
        run(**facts, resume_from_checkpoint=str(finished.run))


@pytest.mark.parametrize(
    ("names", "otherwise", "expected"),
    [
        (("01", "05"), "auto", {"01", "05", "904"}),  # and a share of the groups with Pink alone
        (("gone",), "02", {"02"}),
        (("gone", "03"), "2", {"03", "904"}),
    ],
)
def test_groups_held_out_before_stay_so_beside_new_classes(other_classes, names, otherwise, expected):
    held_out = HeldOut(names, frozenset({"green", "red", "blue"}), otherwise)
    layout = read_layout(other_classes, group_pattern=r"_g(\d+)_", test_groups="none", val_groups=held_out)
    assert {video.group for video in layout.subset("val")} == expected
