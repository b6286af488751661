"""`tvit eval --compare`: two models on the videos that count for both."""

import json
import shutil
from pathlib import Path

import pytest
from pages import Page
from tiny import SCRATCH, make_clips, run

from tvit_cli.data.layout import read_layout
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.evaluate.compare import compare
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.results import Note
from tvit_cli.settings.base import load
from tvit_cli.settings.eval import EvalSettings

SUBSETS = {"group_pattern": r"_g(\d+)_", "val_groups": "1", "test_groups": "1"}
NO_GROUPS = {"val_groups": "none", "test_groups": "none"}  # but for what the data states


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    return run(
        path_to_data=str(make_clips(root / "colours", groups=4)),
        working_directory=root / "runs",
        epochs=1,
        **SCRATCH,
    )


def data_of(trained):
    return Path(json.loads((trained.run / "settings.json").read_text())["path_to_data"])


def copy_of(trained, folder, **changes):
    """The model in another folder, as if it had been trained with other settings."""
    shutil.copytree(trained.model, folder)
    card = json.loads((folder / "card.json").read_text())
    card["settings"] |= changes
    card["held_out"] = {}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def compared(first, second, **changes):
    facts = {"compare": (first, second), "num_workers": 0, "device": "cpu", **changes}
    return compare(EvalSettings.model_validate(facts))


def measured(comparison):
    assert comparison.report is not None
    return Page(comparison.report.read_text(encoding="utf-8")).text


def test_videos_with_differing_true_classes_are_not_compared(trained, tmp_path):
    swapped = {"Red": "Blue", "Blue": "Red", "Green": "Green"}  # as many of each class as before
    videos = read_layout(data_of(trained), **SUBSETS).videos
    rows = [f"{video.path},{swapped[video.label]},{video.subset}" for video in videos]
    manifest = tmp_path / "swapped.csv"
    manifest.write_text("\n".join(["path,label,subset", *rows]) + "\n")
    other = copy_of(trained, tmp_path / "other" / "model", path_to_data=str(manifest), **NO_GROUPS)
    said = r"_g\d\d_c01.avi has the label Blue for the first model and Red for the second"
    with pytest.raises(SettingsError, match=said):
        compared(trained.model, other, output=tmp_path / "out")


def test_models_on_different_data_are_refused_before_scoring(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("tvit_cli.engine.evaluate.score", lambda *a, **k: pytest.fail("was scored"))
    elsewhere = make_clips(tmp_path / "colours", groups=4)
    other = copy_of(trained, tmp_path / "other" / "model", path_to_data=str(elsewhere))
    with pytest.raises(SettingsError, match="not scored on the same videos"):
        compared(trained.model, other, output=tmp_path / "out")


def test_models_on_partly_other_data_are_compared_on_what_they_share(trained, tmp_path):
    videos = [v for v in read_layout(data_of(trained), **SUBSETS).videos if v.subset == "test"]
    rows = [f"{video.path},{video.label},test" for video in videos[1:]]
    (tmp_path / "fewer.csv").write_text("\n".join(["path,label,subset", *rows]) + "\n")
    other = copy_of(
        trained, tmp_path / "other" / "model", path_to_data=str(tmp_path / "fewer.csv"), **NO_GROUPS
    )
    events = []
    facts = {"compare": (trained.model, other), "num_workers": 0, "device": "cpu", "output": tmp_path / "out"}
    result = compare(EvalSettings.model_validate(facts), events.append)
    assert result.videos == result.first.metrics["videos"] == result.second.metrics["videos"] == 2
    text = "Compared on the 2 videos that both models have; 1 of the first and 0 of the second left out."
    assert Note(text, "warning") in events


def test_the_page_says_which_of_the_compared_videos_could_not_be_read(trained, tmp_path):
    data = shutil.copytree(data_of(trained), tmp_path / "colours")
    (data / "Red" / "v_Red_g01_c02.avi").write_text("not a video")
    facts = {"path_to_data": str(data), "subset": "train", "val_groups": "04,", "test_groups": "03,"}
    left_out = compared(trained.model, trained.model, output=tmp_path / "a", **facts)
    assert left_out.videos == 6 and "videos6 that both could read, of 2 groups" in measured(left_out)
    wrong = compared(trained.model, trained.model, output=tmp_path / "b", unreadable="wrong", **facts)
    assert wrong.videos == 7
    assert "videos7, of which 1 could not be read and count as wrong, of 2 groups" in measured(wrong)


def test_a_comparison_leaves_the_results_of_eval_alone(trained, tmp_path):
    evaluated = evaluate(EvalSettings(model=trained.model, num_workers=0, device="cpu")).output
    before = {path.name: path.stat().st_mtime_ns for path in evaluated.iterdir()}
    other = copy_of(trained, tmp_path / "models" / "before")
    result = compared(other, trained.model)
    assert result.output == trained.run / "eval" / "test-vs-before"
    assert (result.first.output, result.second.output) == (result.output / "A", result.output / "B")
    for output, model in zip((result.output / "A", result.output / "B"), (other, trained.model), strict=True):
        assert json.loads((output / "metrics.json").read_text())["model"] == str(model)
    assert (result.output / "comparison.json").is_file()
    assert {path.name: path.stat().st_mtime_ns for path in evaluated.iterdir()} == before


def test_two_models_behind_one_folder_by_two_paths_each_get_their_own(trained, tmp_path):
    first = copy_of(trained, tmp_path / "models" / "before")
    second = copy_of(trained, tmp_path / "models" / "after")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for other in (tmp_path / "link" / "after", second / ".." / "after"):
        result = compared(first, other)
        assert result.first.output != result.second.output
        assert json.loads((result.first.output / "metrics.json").read_text())["model"] == str(first)


def test_each_model_is_opened_once(trained, tmp_path, monkeypatch):
    opened = []

    def counting(model, **how):
        opened.append(model)
        return open_trained(model, **how)

    monkeypatch.setattr("tvit_cli.engine.evaluate.compare.open_trained", counting)
    monkeypatch.setattr("tvit_cli.engine.evaluate.open_trained", counting)
    models = (trained.model, copy_of(trained, tmp_path / "other" / "model"))
    compared(*models, output=tmp_path / "out")
    assert tuple(opened) == models


def test_a_comparison_that_cannot_be_written_says_so(trained, tmp_path):
    (tmp_path / "comparison.json").mkdir()
    said = r"cannot be written \(Is a directory\). Free some space, or choose another"
    with pytest.raises(RunError, match=said):
        compared(trained.model, trained.model, output=tmp_path)


def test_a_third_model_beside_the_two_that_are_compared_is_refused():
    flags = {"compare": (Path("a"), Path("b")), "model": Path("c")}
    with pytest.raises(SettingsError, match=r"--compare names both models\. Leave out --model"):
        load(EvalSettings, flags=flags, environ={})


def test_what_is_true_of_one_model_alone_is_said_of_it_alone(trained, tmp_path):
    twin = copy_of(trained, tmp_path / "twin" / "model")
    other = copy_of(trained, tmp_path / "other" / "model", path_to_data="elsewhere")
    facts = {"subset": "train", "path_to_data": str(data_of(trained)), "output": tmp_path / "out"}
    both, one = (
        measured(compared(trained.model, twin, **facts)),
        measured(compared(trained.model, other, **facts)),
    )
    assert "The model was trained on these videos" in both and "colours-1: " not in both
    assert "colours-1: The model was trained on these videos" in one
    assert "other: It is unknown whether scored videos are in the model's training data (elsewhere)" in one


def test_two_models_of_one_name_are_told_apart_by_their_paths(trained, tmp_path):
    models = [copy_of(trained, tmp_path / where / "people" / "model") for where in ("here", "there")]
    text = measured(compared(*models))
    assert f"{models[1]} against {models[0]}" in text
    assert f"people against {trained.run.name}" in measured(compared(trained.model, models[0]))


def test_both_models_are_scored_in_the_number_format_that_was_asked_for(trained, tmp_path):
    comparison = compared(
        trained.model, copy_of(trained, tmp_path / "b"), mixed_precision="bf16", output=tmp_path
    )
    for result in (comparison.first, comparison.second):
        assert json.loads((result.output / "metrics.json").read_text())["mixed_precision"] == "bf16"
