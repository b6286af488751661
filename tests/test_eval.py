"""`tvit eval`: a model folder scored on a subset."""

import csv
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from entry import run_python
from safetensors.torch import load_file
from tiny import change_weights, make_clips, run

from tvit_cli import cli
from tvit_cli.data import clips
from tvit_cli.data.augment import eval_transform
from tvit_cli.data.video import read_clip
from tvit_cli.engine.dataset import open_dataset
from tvit_cli.engine.evaluate import evaluate, scoring
from tvit_cli.engine.evaluate.compare import compare
from tvit_cli.engine.evaluate.files import write_result
from tvit_cli.engine.launch import ProcessGroup
from tvit_cli.errors import DataError, ModelError, RunError, SettingsError
from tvit_cli.model.folder import load_card, load_model
from tvit_cli.portable.reading import segment_indices
from tvit_cli.results import Note, silent
from tvit_cli.settings.base import load
from tvit_cli.settings.eval import EvalSettings


@pytest.fixture(scope="module")
def trained(classifier):
    return classifier


def settings(trained, **changes):
    return EvalSettings.model_validate({"model": trained.model, "num_workers": 0, "device": "cpu", **changes})


def test_it_scores_the_test_videos_of_the_training_and_writes_them_down(trained):
    result = evaluate(settings(trained))
    assert result.metrics["videos"] == 3  # one held-out group of three classes
    assert result.output == trained.run / "eval" / "test"
    written = json.loads((result.output / "metrics.json").read_text())
    assert written["metrics"] == result.metrics
    assert result.intervals == {}  # three clips of one group are one observation
    rows = list(csv.DictReader((result.output / "scores.csv").read_text().splitlines()))
    assert len(rows) == 3
    assert {row["group"] for row in rows} == {answer.video.group for answer in result.answers}
    assert {row["group"] for row in rows} == set(load_card(trained.model).held_out["test"])
    header, *counts = csv.reader((result.output / "confusion.csv").read_text().splitlines())
    found = {(row[0], said): int(n) for row in counts for said, n in zip(header[1:], row[1:], strict=True)}
    assert {pair for pair, n in found.items() if n} == {(a.video.label, a.predicted) for a in result.answers}
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert result.metrics["video_top1"] == right / 3
    assert sum(row.right for row in result.per_class.values()) == right
    for row in rows:
        scores = {label: float(row[label]) for label in ("Blue", "Green", "Red")}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
        assert max(scores, key=lambda label: scores[label]) == row["predicted"]
        assert row["label_score"] == row[row["label"]]


def test_the_documented_search_lists_the_lowest_own_scores_first(trained):
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command = re.search(r"^sort .*$", text, re.MULTILINE)[0]
    output = evaluate(settings(trained, subset="train")).output
    command = command.replace("working_directory/mine/eval/train", shlex.quote(str(output)))
    header, *lines = subprocess.check_output(command, shell=True, text=True).splitlines()
    assert header == "video,group,label,predicted,label_score" and len(lines) == 12
    own = [float(line.split(",")[4]) for line in lines]
    assert own == sorted(own)


def test_scoring_twice_gives_the_same_bytes(trained, tmp_path):
    for name in ("a", "b"):
        evaluate(settings(trained, output=tmp_path / name, num_workers=2 if name == "b" else 0))
    assert (tmp_path / "a" / "scores.csv").read_bytes() == (tmp_path / "b" / "scores.csv").read_bytes()


def test_the_run_folder_stands_for_its_model(trained):
    assert evaluate(settings(trained, model=trained.run)).model == trained.model


def test_without_a_model_the_newest_of_the_working_directory_is_taken(trained):
    assert (
        evaluate(settings(trained, model=None, working_directory=trained.run.parent)).model == trained.model
    )


def test_the_validation_metrics_of_training_are_found_again(trained):
    result = evaluate(settings(trained, subset="val", top_k=2))
    for name in ("loss", "video_top1", "video_top2"):
        assert result.metrics[name] == pytest.approx(trained.best[f"val_{name}"], abs=1e-6)


def test_shuffled_frames_have_results_of_their_own(trained):
    plain, shuffled = evaluate(settings(trained)), evaluate(settings(trained, shuffle_frames=True))
    assert shuffled.output.name == "test-shuffled"
    assert shuffled.metrics["loss"] != plain.metrics["loss"]
    assert evaluate(settings(trained, shuffle_frames=True)).metrics == shuffled.metrics
    assert evaluate(settings(trained, shuffle_frames=True, seed=1)).metrics != shuffled.metrics


def test_top_k_above_the_number_of_classes_is_clamped_and_said(trained):
    result = evaluate(settings(trained, top_k=9))
    assert result.metrics["video_top3"] == 1.0
    assert any("--top-k 9" in note for note in result.notes)


def test_an_unreadable_video_is_reported_and_left_out(trained, tmp_path):
    data = tmp_path / "colours"
    shutil.copytree(json.loads((trained.run / "settings.json").read_text())["path_to_data"], data)
    whole = evaluate(settings(trained, path_to_data=str(data), output=tmp_path / "a"))
    extra = data / "Red" / "v_Red_g06_c02.avi"
    extra.write_text("not a video")
    events = []
    facts = settings(trained, path_to_data=str(data), output=tmp_path / "b", test_groups="06")
    result = evaluate(facts, events.append)
    again = evaluate(settings(trained, path_to_data=str(data), output=tmp_path / "c", test_groups="06"))
    assert result.metrics["unreadable"] == 1
    assert list(result.unreadable) == ["Red/v_Red_g06_c02.avi"]
    assert result.metrics["videos"] == 3 and again.metrics == result.metrics
    wrong = evaluate(
        settings(trained, path_to_data=str(data), output=tmp_path / "d", test_groups="06", unreadable="wrong")
    )
    assert result.metrics["video_top1"] > 0
    assert wrong.metrics["video_top1"] == pytest.approx(result.metrics["video_top1"] * 3 / 4)
    red = wrong.per_class["Red"]
    assert (red.videos, red.right) == (2, result.per_class["Red"].right) and wrong.metrics["videos"] == 4
    assert red.recall == result.per_class["Red"].recall / 2 and len(wrong.answers) == 4
    assert wrong.metrics["mean_class_accuracy"] < result.metrics["mean_class_accuracy"]
    assert any("v_Red_g06_c02.avi" in e.text for e in events if isinstance(e, Note) and e.level == "warning")
    assert "unreadable" in whole.metrics


def test_groups_that_came_after_training_do_not_move_the_test_subset(tmp_path):
    data = make_clips(tmp_path / "colours", groups=6)
    facts = {"path_to_data": str(data), "hf_model_name": None, "width": 16, "depth": 1, "num_heads": 2}
    result = run(
        **facts, working_directory=tmp_path, train="all", epochs=1, test_groups="auto", val_groups="auto"
    )
    before = evaluate(settings(result))
    make_clips(data, groups=10)
    after = evaluate(settings(result))
    assert after.metrics == before.metrics
    assert load_card(result.model).held_out["test"]


def test_eval_holds_out_the_same_videos_with_commas_in_names(tmp_path):
    data = make_clips(tmp_path / "colours", groups=4)
    for path in sorted(data.glob("*/*.avi")):
        path.rename(path.with_name(path.name.removeprefix("v_").replace("_g", ", take ").replace("_c01", "")))
    facts = {"path_to_data": str(data), "hf_model_name": None, "width": 16, "depth": 1, "num_heads": 2}
    result = run(**facts, working_directory=tmp_path, train="all", epochs=1, test_groups="2", val_groups="2")
    held_out = load_card(result.model).held_out
    assert all(", take " in name for names in held_out.values() for name in names)
    found = evaluate(settings(result))
    assert tuple(answer.video.name for answer in found.answers) == held_out["test"] and not found.leaks
    written = json.loads((found.output / "metrics.json").read_text())
    assert (written["val_groups"], written["test_groups"]) == (list(held_out["val"]), list(held_out["test"]))


def test_none_and_bad_patterns_are_taken_as_they_are_typed(trained):
    assert load(EvalSettings, flags={"val_groups": "none"}, environ={}).settings.val_groups == "none"
    with pytest.raises(SettingsError, match="not a regular expression"):
        load(EvalSettings, flags={"group_pattern": "("}, environ={})


def test_the_metrics_file_says_what_was_scored(trained):
    written = json.loads((evaluate(settings(trained)).output / "metrics.json").read_text())
    assert written["data"].endswith("colours") and written["frames"] == "videos" and written["split"] == 1


def test_a_subset_without_videos_is_refused(trained):
    with pytest.raises(DataError, match="--subset val"):
        evaluate(settings(trained, subset="val", val_groups="none"))


def test_classes_that_the_model_does_not_know_are_refused(trained, tmp_path):
    data = make_clips(tmp_path / "more", groups=3)
    (data / "Red").rename(data / "Crimson")
    with pytest.raises(DataError, match="Crimson"):
        evaluate(settings(trained, path_to_data=str(data), test_groups="1"))


@pytest.mark.parametrize("count", [7, 8, 9, 13])
def test_scores_of_several_processes_are_those_of_one_bit_for_bit(trained, count):
    from tvit_cli.engine.dataset import open_dataset
    from tvit_cli.engine.trained import open_trained

    opened = open_trained(trained.model, working_directory=Path(), device=torch.device("cpu"))
    source = open_dataset(
        opened.card.settings["path_to_data"], group_pattern=opened.card.settings["group_pattern"],
        val_groups="1", test_groups="1", split=1, report=lambda event: None,
    )  # fmt: skip
    videos = source.layout.videos[:count]
    assert len(videos) == count

    def score(rank, processes):
        clips = scoring.clips_to_score(videos, opened.card.labels, opened.card.preprocessing)
        group = ProcessGroup(rank, processes, opened.device, lambda own: [own])
        return scoring.score(opened.model, clips, group, batch_size=4, workers=0)

    one = score(0, 1)
    for processes in (2, 3, 5):
        merged = scoring.merge_scores([score(rank, processes) for rank in range(processes)])
        assert merged.indices.tolist() == list(range(count))
        assert torch.equal(merged.labels, one.labels) and torch.equal(merged.logits, one.logits)


def test_nothing_readable_is_an_error_and_not_a_number(trained, tmp_path):
    data = make_clips(tmp_path / "colours", groups=3)
    for path in data.glob("*/*_g03_*"):
        path.write_text("text")
    with pytest.raises((RunError, SettingsError), match="can be read"):
        evaluate(settings(trained, path_to_data=str(data), test_groups="03", val_groups="none"))


def test_settings_given_to_eval_reach_the_layout(trained, monkeypatch):
    from tvit_cli.engine import dataset

    seen = []
    real = dataset.read_layout

    def spy(root, **choice):
        seen.append(choice)
        return real(root, **choice)

    monkeypatch.setattr(dataset, "read_layout", spy)
    evaluate(settings(trained, split=3, test_groups="2", group_pattern=r"g(\d\d)"))
    assert (seen[0]["split"], seen[0]["test_groups"], seen[0]["group_pattern"]) == (3, "2", r"g(\d\d)")


def test_batches_and_workers_are_as_asked_for(trained, monkeypatch):
    seen = []
    real = clips.DataLoader

    def spy(*arguments, **keywords):
        keywords["batch_sampler"] = list(keywords["batch_sampler"])  # an iterator gives its batches once
        seen.append((max(map(len, keywords["batch_sampler"])), keywords["num_workers"]))
        return real(*arguments, **keywords)

    monkeypatch.setattr(clips, "DataLoader", spy)
    evaluate(settings(trained, per_gpu_batch_size=2, num_workers=1))
    assert seen == [(2, 1)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(trained):
    with pytest.raises(ModelError, match="--device cpu"):
        evaluate(settings(trained, device="cuda"))


def test_more_views_are_averaged_scores_of_clips_at_other_places(trained, tmp_path):
    one = evaluate(settings(trained, output=tmp_path / "1"))
    model, card = load_model(trained.model)
    source = open_dataset(
        card.settings["path_to_data"], group_pattern=r"_g(\d+)_", val_groups="1", test_groups="1", split=1,
        report=silent,
    )  # fmt: skip
    for number, (changes, views) in enumerate(
        {
            "clips_per_video": ({"clips_per_video": 2}, [(1 / 4, 0.5, False), (3 / 4, 0.5, False)]),
            "crops_per_clip": ({"crops_per_clip": 3}, [(1 / 2, p, False) for p in (0.0, 0.5, 1.0)]),
            "flip": ({"flip": True}, [(1 / 2, 0.5, False), (1 / 2, 0.5, True)]),
        }.values()
    ):
        more = evaluate(settings(trained, output=tmp_path / str(number + 2), **changes))
        assert "clip_top1" in more.metrics and "clip_top1" not in one.metrics
        for answer, video in zip(more.answers, source.layout.subset("test"), strict=True):
            scores = [
                model(
                    eval_transform(
                        [
                            torch.from_numpy(
                                read_clip(
                                    video.path,
                                    lambda n, place=place: segment_indices(n, 4, [place] * 4),
                                    short_side=32,
                                ).frames
                            ).permute(0, 3, 1, 2)
                        ],
                        preprocessing=card.preprocessing,
                        device=torch.device("cpu"),
                        position=where,
                        flip=mirrored,
                    )
                ).softmax(1)
                for place, where, mirrored in views
            ]
            torch.testing.assert_close(torch.tensor([answer.scores]), torch.stack(scores).mean(0))
        assert [a.scores for a in more.answers] != [a.scores for a in one.answers]


def test_crops_of_squashed_frames_are_refused(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained.model, folder)
    card = json.loads((folder / "card.json").read_text())
    card["preprocessing"]["resize"] = "squash"
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(SettingsError, match="--crops-per-clip 3: this model squashes whole frames"):
        evaluate(settings(trained, model=folder, crops_per_clip=3))


def test_class_names_in_result_files_are_no_formulas(trained, tmp_path):
    result = evaluate(settings(trained))
    write_result(dataclasses.replace(result, output=tmp_path, labels=("=1+1", *result.labels[1:])), {})
    for name in ("scores.csv", "confusion.csv"):
        header = (tmp_path / name).read_text().splitlines()[0].split(",")
        assert "'=1+1" in header and "=1+1" not in header


def test_two_processes_find_what_one_finds(trained, tmp_path):
    one = evaluate(settings(trained, subset="train", output=tmp_path / "one"))
    words = ("eval", "--model", trained.model, "--subset", "train", "--output", tmp_path / "two")
    done = run_python("-m", "tvit_cli", *words, "--num-processes", 2, "--device", "cpu")
    assert done.code == 0, done.err
    assert done.out.count("Written to") == 1
    for name in ("scores.csv", "confusion.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    written = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert written["metrics"] == one.metrics
    assert written["intervals"] == {name: list(ends) for name, ends in one.intervals.items()}


@pytest.mark.parametrize("form", ["folder", "test rows", "one class"])
def test_data_that_was_made_for_testing_alone_is_scored(trained, tmp_path, form):
    clips = make_clips(tmp_path / "others", groups=2)
    facts = {"subset": "all", "path_to_data": str(clips)}
    if form == "test rows":
        manifest = tmp_path / "others.csv"
        rows = [f"{path},{path.parent.name},test" for path in sorted(clips.glob("*/*.avi"))]
        manifest.write_text("\n".join(["path,label,subset", *rows]) + "\n")
        facts = {"path_to_data": str(manifest), "val_groups": "none", "test_groups": "none"}
    elif form == "one class":
        shutil.rmtree(clips / "Red")
        shutil.rmtree(clips / "Green")
    count = len(list(clips.glob("*/*.avi")))
    result = evaluate(settings(trained, output=tmp_path / "out", **facts))
    assert result.metrics["videos"] == count == len(result.answers)
    assert not result.leaks


def test_eval_of_all_videos_notes_training_videos(trained, tmp_path):
    result = evaluate(settings(trained, subset="all", output=tmp_path / "out"))
    train = evaluate(settings(trained, subset="train", output=tmp_path / "train")).metrics["videos"]
    whole = result.metrics["videos"]
    assert train < whole and not result.leaks
    said = f"The model was trained on {train:.0f} of the {whole:.0f} videos"
    assert any(said in warning for warning in result.warnings)


def test_groups_beside_all_videos_are_refused():
    said = r"--subset all scores every video\. Leave out --val-groups and --test"
    with pytest.raises(SettingsError, match=said):
        load(EvalSettings, flags={"subset": "all", "val_groups": "1", "test_groups": "1"}, environ={})


def test_compare_checks_the_second_model_before_scoring(trained, tmp_path):
    pair = (trained.model, tmp_path / "nowhere")
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        compare(settings(trained, subset="train", output=tmp_path / "out", model=None, compare=pair))
    assert not (tmp_path / "out").exists()


def test_two_models_are_compared_on_the_same_videos(trained, tmp_path):
    worse = tmp_path / "worse"
    shutil.copytree(trained.model, worse)
    weights = load_file(worse / "model.safetensors")
    names = ("classifier.weight", "classifier.bias")  # every answer is the next class
    change_weights(worse, **{name: weights[name].roll(1, 0) for name in names})
    result = compare(
        settings(trained, subset="train", output=tmp_path / "out", model=None, compare=(trained.model, worse))
    )
    right = [answer.is_right for answer in result.first.answers]
    assert sum(right) > 6
    assert result.difference == result.second.metrics["video_top1"] - result.first.metrics["video_top1"] < 0
    assert len(result.lost) == sum(right) and not result.gained
    assert result.interval is not None and result.interval[1] < 0
    assert result.p_value == 2 / 2 ** len(result.lost)
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(written["lost"]) == len(result.lost)
    assert written["lost"][0]["first"] == written["lost"][0]["label"]
    with pytest.raises(SystemExit) as end:
        cli.run(["eval", "--compare", str(trained.model), str(worse), "--output", str(tmp_path / "cli")])
    assert end.value.code == 0


def test_eval_precision_is_used_and_recorded(trained, tmp_path):
    def scored(name, **how):
        result = evaluate(settings(trained, output=tmp_path / name, **how))
        rows = (result.output / "scores.csv").read_text().splitlines()
        return json.loads((result.output / "metrics.json").read_text()), rows

    auto, whole = scored("auto"), scored("no", mixed_precision="no")
    half = scored("bf16", mixed_precision="bf16")
    assert auto[0]["mixed_precision"] == whole[0]["mixed_precision"] == "no" and auto[1] == whole[1]
    assert half[0]["mixed_precision"] == "bf16" and half[1] != whole[1]
    assert abs(half[0]["metrics"]["loss"] - whole[0]["metrics"]["loss"]) < 0.1
    with pytest.raises(SettingsError, match="--mixed-precision fp16"):
        evaluate(settings(trained, mixed_precision="fp16"))


SHOWN = {
    "model": test_the_run_folder_stands_for_its_model,
    "working_directory": test_without_a_model_the_newest_of_the_working_directory_is_taken,
    "subset": test_the_validation_metrics_of_training_are_found_again,
    "path_to_data": test_classes_that_the_model_does_not_know_are_refused,
    "group_pattern": test_none_and_bad_patterns_are_taken_as_they_are_typed,
    "split": test_settings_given_to_eval_reach_the_layout,
    "val_groups": test_a_subset_without_videos_is_refused,
    "test_groups": test_settings_given_to_eval_reach_the_layout,
    "top_k": test_top_k_above_the_number_of_classes_is_clamped_and_said,
    "per_gpu_batch_size": test_batches_and_workers_are_as_asked_for,
    "num_workers": test_batches_and_workers_are_as_asked_for,
    "device": test_a_device_that_is_not_there_is_refused,
    "unreadable": test_an_unreadable_video_is_reported_and_left_out,
    "shuffle_frames": test_shuffled_frames_have_results_of_their_own,
    "seed": test_shuffled_frames_have_results_of_their_own,
    "compare": test_two_models_are_compared_on_the_same_videos,
    "clips_per_video": test_more_views_are_averaged_scores_of_clips_at_other_places,
    "crops_per_clip": test_more_views_are_averaged_scores_of_clips_at_other_places,
    "flip": test_more_views_are_averaged_scores_of_clips_at_other_places,
    "num_processes": test_two_processes_find_what_one_finds,
    "mixed_precision": test_eval_precision_is_used_and_recorded,
    "output": test_scoring_twice_gives_the_same_bytes,
}


def test_every_setting_of_eval_has_a_test_of_its_effect():
    assert set(SHOWN) == set(EvalSettings.model_fields)


def test_results_on_other_data_leave_those_of_the_own_test_alone(trained, tmp_path):
    own = evaluate(settings(trained))
    clips = make_clips(tmp_path / "elsewhere", groups=4)
    shutil.rmtree(clips / "Red")
    other = evaluate(settings(trained, path_to_data=str(clips), test_groups="1"))
    assert other.output == trained.run / "eval" / "test-elsewhere" and other.subset == "test"
    assert json.loads((own.output / "metrics.json").read_text())["metrics"] == own.metrics
    same = load_card(trained.model).settings["path_to_data"]
    assert evaluate(settings(trained, path_to_data=str(same))).output == own.output


def test_classes_that_are_spelt_otherwise_are_the_same(trained, tmp_path):
    clips = make_clips(tmp_path / "colours", groups=4)
    before = evaluate(settings(trained, path_to_data=str(clips), output=tmp_path / "a", test_groups="1"))
    (clips / "Red").rename(clips / "red")
    after = evaluate(settings(trained, path_to_data=str(clips), output=tmp_path / "b", test_groups="1"))
    assert after.metrics == before.metrics and set(after.per_class) == {"Blue", "Green", "Red"}
    other = tmp_path / "other"
    shutil.copytree(trained.model, other)
    card = (other / "card.json").read_text().replace('"Red"', '"RED"')
    (other / "card.json").write_text(card)
    pair = (trained.model, other)
    both = compare(
        settings(trained, model=None, compare=pair, path_to_data=str(clips), output=tmp_path / "c")
    )
    assert both.difference == 0 and both.second.labels == both.first.labels


@pytest.mark.parametrize("verb", ["one", "pair"])
def test_eval_checks_the_results_folder_before_scoring(trained, tmp_path, monkeypatch, verb):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("tvit_cli.engine.evaluate.score", lambda *a, **k: pytest.fail("was scored"))
    with pytest.raises(DataError, match=r"--output .*taken.* is a file, not a folder"):
        if verb == "one":
            evaluate(settings(trained, output=tmp_path / "taken"))
        else:
            pair = (trained.model, trained.run)
            compare(settings(trained, model=None, compare=pair, output=tmp_path / "taken"))


def test_a_comparison_on_one_group_has_no_interval(trained, tmp_path):
    other = shutil.copytree(trained.model, tmp_path / "other")
    pair = (trained.model, other)
    own = settings(trained, model=None, compare=pair, output=tmp_path / "out")
    assert compare(own).interval is None
    several = own.model_copy(update={"subset": "train", "output": tmp_path / "train"})
    assert compare(several).interval is not None


def test_every_way_to_measure_has_a_folder_of_its_own(trained):
    own = evaluate(settings(trained))
    before = (own.output / "metrics.json").read_bytes()
    views = {"clips_per_video": 2, "crops_per_clip": 3}
    for name, changes in {
        "test-2x3": views,
        "test-2x3-flip": {**views, "flip": True},
        "test-shuffled-seed1": {"shuffle_frames": True, "seed": 1},
        "test-split2": {"split": 2},
        "test-unreadable-wrong": {"unreadable": "wrong"},
    }.items():
        assert evaluate(settings(trained, **changes)).output == own.output.with_name(name)
    assert (own.output / "metrics.json").read_bytes() == before


def test_eval_names_the_results_that_it_replaces(trained, tmp_path):
    said = []
    for _ in range(2):
        said.append([])
        evaluate(settings(trained, output=tmp_path / "out"), said[-1].append)
    first, second = ([e.text for e in events if isinstance(e, Note)] for events in said)
    text = f"Replaces the results in {tmp_path / 'out'}. To keep them, name another folder with --output."
    assert text not in first and text in second


@pytest.mark.parametrize("content", [None, "[1]", '{"accuracy": 1}'])
def test_eval_refuses_to_replace_files_that_are_no_results(trained, tmp_path, content):
    foreign = tmp_path / ("scores.csv" if content is None else "metrics.json")
    foreign.write_text(content or "mine")
    with pytest.raises(SettingsError, match=f"no results: {foreign.name}. To keep them, name another folder"):
        evaluate(settings(trained, output=tmp_path))
    assert foreign.read_text() == (content or "mine")
