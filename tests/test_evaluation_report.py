"""Reports of evaluations, series and comparisons."""

import base64
import io
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import simplejpeg
import torch
from entry import tvit
from pages import Page, opened_in_chromium, trouble_in_chromium
from PIL import Image
from safetensors.torch import load_file
from tiny import COLOURS, SCRATCH, change_weights, make_clips, run

from tvit_cli.data.layout import Video, read_layout
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.evaluate.compare import compare
from tvit_cli.engine.extract import extract
from tvit_cli.engine.train.sweep import evaluate_series
from tvit_cli.engine.trained import run_name, series_models
from tvit_cli.errors import DataError, plural
from tvit_cli.model.folder import load_card
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.report import evaluation, html
from tvit_cli.report.charts import (
    MOST_CLASSES,
    class_chart,
    confidence_chart,
    confusion_chart,
    coverage_chart,
    reliability_chart,
    shown_classes,
    worst_first,
)
from tvit_cli.report.comparison import comparison_drawings, comparison_page, write_comparison_report
from tvit_cli.report.drawing import Box, Dot, Line, Text
from tvit_cli.report.evaluation import (
    MOST_STRIPS,
    evaluation_drawings,
    evaluation_page,
    write_evaluation_report,
)
from tvit_cli.report.html import Context
from tvit_cli.results import (
    BINS,
    RESAMPLES,
    Bin,
    ClassScore,
    Comparison,
    EvalResult,
    Note,
    VideoPrediction,
    silent,
)
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.extract import ExtractSettings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    return run(
        path_to_data=str(make_clips(root / "colours")), working_directory=root / "runs", epochs=1,
        learning_rate=1e-4, **SCRATCH,
    )  # fmt: skip


def settings(trained, **changes):
    return EvalSettings.model_validate({"model": trained.model, "num_workers": 0, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def result(trained):
    return evaluate(settings(trained, subset="train", top_k=2, clips_per_video=3))


def page_of(result):
    assert result.report is not None
    return Page(result.report.read_text(encoding="utf-8"))


class Clips:
    """Black clips of any video."""

    preprocessing = Preprocessing(n_frames=3, frame_size=16)

    def clip(self, name: str) -> torch.Tensor:
        return torch.zeros(3, 3, 16, 16)


def video(name, label, group=None):
    return Video(Path(name), name, label, "test", group)


def made_up(folder, labels=("Archery", "Bowling"), **changes):
    """The result of an evaluation that never was: three correct answers and a wrong one, of two groups."""
    first, second = labels[:2]
    rest = (0.0,) * (len(labels) - 2)
    scores = [(0.62, 0.38), (0.62, 0.38), (0.38, 0.62), (0.97, 0.03)]
    truth = (first, first, second, second)
    answers = [
        VideoPrediction(video(f"b/{n}.avi", label, f"g{n % 2}"), labels[s[1] > s[0]], s + rest)
        for n, (label, s) in enumerate(zip(truth, scores, strict=True))
    ]
    values = {
        "metrics": {"videos": 4.0, "unreadable": 0.0, "video_top1": 0.75, f"video_top{len(labels)}": 1.0,
                    "mean_class_accuracy": 0.75, "macro_f1": 0.7333, "calibration_error": 0.2},
        "intervals": {"video_top1": (0.5, 1.0)},
        "per_class": {first: ClassScore(2, 2, 3), second: ClassScore(2, 1, 1)},
        "confused": ((second, first, 1),),
        "answers": tuple(answers),
        "labels": labels,
        "unreadable": {},
        "seconds": 2.0,
        "subset": "test",
        "model": Path("people/model"),
        "name": "people",
        "output": folder,
        "notes": (),
        "calibration": (Bin(0.6, 0.6667, 3, 0.62, 1.0), Bin(0.9333, 1.0, 1, 0.97, 0.0)),
        "clips": Clips(),
        **changes,
    }  # fmt: skip
    return EvalResult(**values)


CONTEXT = Context(
    {"data": "here"}, [("Repeat this evaluation", "tvit eval --model people")], torch.device("cpu")
)


def written(own, context=CONTEXT):
    return Page(evaluation_page(own, context, evaluation_drawings(own)))


def test_an_evaluation_leaves_a_page_that_refers_to_nothing_outside_itself(result):
    assert result.report == result.output / "report.html"
    shown = page_of(result)
    assert shown.references and all(value.startswith("data:") for value in shown.references)
    assert not shown.tags & {"iframe", "object"} and shown.scripts == [html.SCRIPT]
    source = result.report.read_text(encoding="utf-8")
    assert "url(" not in source and "@import" not in source and "http://" not in source
    assert "https://" not in source
    assert source.count("<img ") == 2 * source.count(' alt="Frames of ') == 2 * source.count(' alt="">')
    for name in COLOURS:
        assert name in shown.text


def test_its_figures_are_those_of_the_metrics_file(result):
    text = page_of(result).text
    found = json.loads((result.output / "metrics.json").read_text())
    metrics, intervals = found["metrics"], found["intervals"]
    titles = {"video_top1": "top-1", "video_top2": "top-2", "mean_class_accuracy": "mean class accuracy",
              "macro_f1": "macro F1", "calibration_error": "calibration error"}  # fmt: skip
    assert titles.keys() == intervals.keys()
    for name, title in titles.items():
        low, high = (html.percent(end) for end in intervals[name])
        ends = f"{low.removesuffix(' %')} to {high}"
        assert f"{title}{html.percent(metrics[name])}95 % within {ends}" in text.replace("\u00a0", " ")
    assert f"videos{metrics['videos']:.0f}" in text
    for label, row in found["per_class"].items():
        assert f"{label}{row['right']} of {row['videos']}" in text
        shares = html.percent(row["recall"]) + html.percent(row["precision"])
        assert f"{label}{row['right']} of {row['videos']}{shares}{row['f1']:.3f}" in text
    for pair in found["confused"]:
        assert f"{pair['label']}{pair['said']}{pair['videos']}" in text
        assert f"{pair['label']}: {pair['videos']} of " in text
    for b in found["calibration"]:
        assert f"{plural(b['videos'], 'video')}: confidence {html.percent(b['confidence'])}" in text


def test_a_browser_finds_nothing_wrong_and_would_tell(result, tmp_path):
    assert result.report is not None
    assert trouble_in_chromium(result.report) == []
    page = tmp_path / "page.html"
    page.write_text('<main><img src="http://127.0.0.1:9/a.png"><script>console.error("no")</script></main>')
    trouble = trouble_in_chromium(page)
    assert any('"no"' in line for line in trouble)


def test_strips_show_the_frames_that_the_model_was_given(trained, tmp_path, monkeypatch):
    given = []
    real = TemporalViT.forward

    def forward(self, clips):
        given.extend(clips.clone())
        return real(self, clips)

    monkeypatch.setattr(TemporalViT, "forward", forward)
    for changes, place, views in (
        ({}, 0, 1),
        ({"shuffle_frames": True}, 0, 1),
        ({"clips_per_video": 3}, 1, 3),
        ({"crops_per_clip": 3, "flip": True}, 2, 6),
    ):
        given.clear()
        result = evaluate(settings(trained, output=tmp_path, per_gpu_batch_size=3, **changes))
        assert result.clips is not None and len(given) == 3 * views
        for number, answer in enumerate(result.answers):
            clip = result.clips.clip(answer.video.name)
            assert clip is not None and torch.equal(clip, given[place * 3 + number]), changes


def test_wrong_answers_come_surest_first_and_then_the_hardest_of_the_rest(result, trained):
    labels = ("Blue", "Green", "Red")
    wrong = sorted((a for a in result.answers if not a.is_right), key=lambda a: -max(a.scores))
    rest = sorted(
        (a for a in result.answers if a not in wrong[:MOST_STRIPS]),
        key=lambda a: a.scores[labels.index(a.video.label)],
    )
    text = page_of(result).text
    places = [text.index(f"· {a.video.name}") for a in (wrong[:MOST_STRIPS] + rest[:MOST_STRIPS])]
    assert wrong and places == sorted(places)
    surest = wrong[0]
    said = f"{surest.video.label}, predicted {surest.predicted} · {surest.video.name}"
    assert f"{said}{surest.predicted}{html.percent(max(surest.scores))}" in text


def test_a_page_of_many_videos_shows_few_of_them(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_STRIPS", 1)
    result = evaluate(settings(trained, subset="train", output=tmp_path))
    assert sum(uri.startswith("data:image/jpeg") for uri in page_of(result).references) <= 2


def test_the_page_has_its_draws_bins_and_drawings(result, trained, tmp_path, monkeypatch):
    names = {path.name for path in (result.output / "plots").iterdir()}
    assert names == {f"{n}.png" for n in ("confusion", "per_class", "reliability", "confidence", "coverage")}
    with Image.open(result.output / "plots" / "confusion.png") as picture:
        assert picture.format == "PNG" and picture.size[0] == picture.size[1] > 300
    shown = page_of(evaluate(settings(trained, subset="train", output=tmp_path))).text
    assert f"from {RESAMPLES:,} resamples" in shown and f"over {BINS} equal bins" in shown
    monkeypatch.setattr(evaluation, "RESAMPLES", 1234)
    monkeypatch.setattr(evaluation, "BINS", 9)
    text = written(made_up(tmp_path)).text
    assert "from 1,234 resamples of 2 groups" in text and "over 9 equal bins" in text


def test_videos_that_were_trained_on_are_named_as_a_leak(trained, tmp_path):
    events = []
    held_out = load_card(trained.model).held_out
    own = next(f"{n:02d}" for n in range(1, 7) if f"{n:02d}" not in held_out["val"] + held_out["test"])
    result = evaluate(settings(trained, test_groups=f"{own},", output=tmp_path), events.append)
    warning = f"3 of the 3 test videos were trained on (such as Blue/v_Blue_g{own}_c01.avi)"
    assert any(warning in leak for leak in result.leaks) and warning in page_of(result).text
    assert any(warning in e.text for e in events if isinstance(e, Note) and e.level == "warning")
    assert json.loads((tmp_path / "metrics.json").read_text())["leaks"] == list(result.leaks)
    assert not evaluate(settings(trained, test_groups=f"{held_out['test'][0]},", output=tmp_path)).leaks
    assert not evaluate(settings(trained, output=tmp_path)).leaks


def test_groups_of_the_training_that_are_gone_stop_no_evaluation(trained, tmp_path, monkeypatch):
    def gone(*given, **choice):
        raise DataError("--test-groups: no group 04 in train")

    monkeypatch.setattr("tvit_cli.engine.evaluate.selection.read_layout", gone)
    assert evaluate(settings(trained, test_groups="2", output=tmp_path)).leaks == ()


def test_the_same_file_in_two_subsets_is_named_as_a_leak(trained, tmp_path):
    data = make_clips(tmp_path / "colours")
    videos = {
        v.subset: v
        for v in read_layout(data, group_pattern=r"_g(\d+)_", val_groups="1", test_groups="1").videos
    }
    videos["test"].path.write_bytes(videos["train"].path.read_bytes())
    result = evaluate(settings(trained, path_to_data=str(data), output=tmp_path / "out"))
    assert any("byte for byte" in leak for leak in result.leaks) and "byte for byte" in page_of(result).text
    assert not evaluate(
        settings(trained, path_to_data=str(data), output=tmp_path / "t", subset="train")
    ).leaks


def test_the_page_says_what_numbers_on_training_videos_are_worth(result):
    assert "The model was trained on these videos" in page_of(result).text
    assert "used for model selection" not in page_of(result).text


def test_eval_of_other_subsets_notes_partial_data_leakage(trained, tmp_path):
    held_out = load_card(trained.model).held_out
    chosen = page_of(evaluate(settings(trained, subset="val", output=tmp_path))).text
    assert "These videos were used for model selection" in chosen and "trained on these" not in chosen
    groups = {"val_groups": "none", "test_groups": f"{held_out['test'][0]},"}  # val goes to train
    text = page_of(evaluate(settings(trained, subset="train", output=tmp_path, **groups))).text
    assert "The model was trained on 12 of the 15 videos" in text
    assert "3 of the 15 videos were used for model selection" in text
    swapped = {"val_groups": f"{held_out['test'][0]},", "test_groups": f"{held_out['val'][0]},"}
    text = page_of(evaluate(settings(trained, subset="val", output=tmp_path, **swapped))).text
    assert "used for model selection" not in text and "were trained on" not in text


def test_on_other_data_the_page_claims_nothing_about_the_training(trained, tmp_path):
    data = make_clips(tmp_path / "others", groups=3)
    for subset in ("train", "val"):
        own = settings(trained, subset=subset, path_to_data=str(data), output=tmp_path / subset)
        text = page_of(evaluate(own)).text
        assert "The model was trained on" not in text and "used for model selection" not in text
        path = load_card(trained.model).settings["path_to_data"]
        assert f"It is unknown whether scored videos are in the model's training data ({path})." in text
    text = page_of(evaluate(settings(trained, path_to_data=str(data), output=tmp_path / "test"))).text
    assert "It is unknown whether" not in text
    again = settings(trained, path_to_data=load_card(trained.model).settings["path_to_data"], subset="train")
    assert "The model was trained on these videos" in page_of(evaluate(again)).text


@pytest.mark.parametrize("stand_in", ["store", "name", "link"])
def test_leakage_is_found_through_frame_stores_and_links(trained, tmp_path, monkeypatch, stand_in):
    """Trained on `recorded`, scored on `opened`: the same videos in other subsets."""
    videos = Path(load_card(trained.model).settings["path_to_data"])
    monkeypatch.chdir(tmp_path)
    recorded, opened = str(videos), str(videos)
    if stand_in == "store":
        recorded = str(tmp_path / "frames")
        extract(
            ExtractSettings(path_to_data=opened, output=Path(recorded), short_side=16, num_workers=0), silent
        )
    elif stand_in == "name":  # what an export keeps of the path
        Path("data").mkdir()
        shutil.copytree(videos, Path("data", videos.name))
        recorded, opened = videos.name, f"data/{videos.name}"
    else:
        opened = "link"
        Path(opened).symlink_to(videos)
    model = tmp_path / "twin" / "model"
    shutil.copytree(trained.model, model)
    card = json.loads((model / "card.json").read_text())
    card["settings"]["path_to_data"] = recorded
    (model / "card.json").write_text(json.dumps(card))
    held_out = [group for groups in card["held_out"].values() for group in groups]
    own = next(f"{n:02d}" for n in range(1, 7) if f"{n:02d}" not in held_out)
    facts = {"path_to_data": opened, "test_groups": f"{own},", "output": tmp_path / "out"}
    result = evaluate(settings(trained, model=model, **facts))
    assert any("3 of the 3 test videos were trained on" in leak for leak in result.leaks)
    if stand_in == "store":
        again = evaluate(settings(trained, model=model, **facts | {"path_to_data": recorded}))
        assert again.leaks == result.leaks


def test_videos_left_out_stand_on_the_page_with_their_reasons(tmp_path):
    bad = {f"clip{n}.avi": "empty" for n in range(60)}
    text = written(made_up(tmp_path, unreadable=bad)).text
    assert "60 videos cannot be read" in text and "clip49.aviempty" in text and "clip50.avi" not in text


def test_a_report_that_cannot_be_written_costs_no_numbers(trained, tmp_path, monkeypatch):
    def full(*given, **links):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "write_pages", full)
    events = []
    result = evaluate(settings(trained, output=tmp_path), events.append)
    assert result.report is None and (tmp_path / "metrics.json").is_file()
    assert any("report could not be written (No space left" in e.text for e in events if isinstance(e, Note))
    ended = tvit("eval", trained.run, "--device", "cpu", "--num-workers", "0", "--output", tmp_path)
    assert ended.code == 1 and "video_top1" in ended.out
    assert f"error: {tmp_path}: the report is missing; all other results are complete." in ended.err


def test_names_from_outside_are_text_and_never_markup(tmp_path):
    evil = '<script>alert("1")</script>&'
    wrong = VideoPrediction(video(evil, evil), "x", (0.1, 0.9))
    own = made_up(
        tmp_path, labels=(evil, "x"), answers=(wrong,), unreadable={evil: evil}, warnings=(evil,), name=evil
    )
    page = written(own, Context({evil: evil}, [(evil, evil)], torch.device("cpu")))
    assert page.scripts == [html.SCRIPT] and page.text.count(evil) >= 12
    compared = made_up_comparison(tmp_path, {evil: (4, 1, 3), "x": (2, 2, 2)})
    page = Page(comparison_page(compared, CONTEXT, comparison_drawings(compared)))
    assert page.scripts == [html.SCRIPT] and page.text.count(evil) >= 8


def test_confusion_matrix_has_all_cells_and_no_overlapping_text():
    for labels in (("A", "B"), tuple(f"Class number {n}" for n in range(101))):
        counts = {(label, labels[0]): 1 for label in labels} | {(label, label): 3 for label in labels}
        drawing = confusion_chart(labels, counts)
        cells = [s for s in drawing.shapes if isinstance(s, Box) and s.title]
        assert len(cells) == len(counts) == len({cell.at for cell in cells})
        assert f"{labels[1]}: 1 of 4 predicted {labels[0]}" in {cell.title for cell in cells}
        assert all(
            0 < s.at[0] < drawing.width and 0 < s.at[1] < drawing.height
            for s in drawing.shapes
            if isinstance(s, Text)
        )
        rows = sorted(s.at[1] for s in drawing.shapes if isinstance(s, Text) and s.anchor == "end")
        size = next(s.size for s in drawing.shapes if isinstance(s, Text) and s.anchor == "end")
        assert len(rows) == len(labels) and all(b - a >= size for a, b in pairwise(rows))


def test_of_very_many_classes_those_with_the_most_mistakes_are_drawn(tmp_path):
    labels = tuple(f"c{n:03d}" for n in range(400))
    counts = {(label, label): 5 for label in labels} | {("c390", "c391"): 7}
    shown = shown_classes(labels, counts)
    assert len(shown) == MOST_CLASSES and shown == sorted(shown) and {"c390", "c391"} <= set(shown)
    rows = {label: (5, 5 - (label == "c007")) for label in labels}
    bars = class_chart(rows)
    assert bars.height < 3000
    assert next(s.title for s in bars.shapes if isinstance(s, Box) and s.title) == "c007: 4 of 5"
    scores = (1 / 400,) * 400
    answers = tuple(
        VideoPrediction(video(f"{true}-{said}-{n}.avi", true), said, scores)
        for (true, said), videos in counts.items()
        for n in range(videos)
    )
    text = written(made_up(tmp_path, labels=labels, answers=answers)).text
    assert f"{MOST_CLASSES} of 400 classes are shown" in text


def test_classes_that_do_not_occur_have_no_row():
    assert shown_classes(("a", "b", "c"), {("a", "c"): 1}) == ["a", "c"]


def test_confidence_is_drawn_against_accuracy():
    bins = [Bin(0.2, 0.4, 4, 0.3, 0.5), Bin(0.8, 1.0, 2, 0.9, 0.5)]
    bars = [s for s in reliability_chart(bins).shapes if isinstance(s, Box)]
    assert [bar.role for bar in bars] == ["one", "three", "one", "bad"]
    assert bars[1].height == pytest.approx(bars[0].height * 2 / 3)  # 0.3 sure, 0.2 more are right
    assert bars[3].height == pytest.approx(bars[2].height * 4 / 5)  # half are right, 0.4 too sure
    assert bars[3].title == "2 videos: confidence 90 %, accuracy 50 %"
    counts = [s for s in confidence_chart(bins).shapes if isinstance(s, Box)]
    assert [(bar.role, bar.title) for bar in counts[:2]] == [
        ("good", "20 % to 40 %: 2 correct, 2 wrong"), ("bad", "20 % to 40 %: 2 correct, 2 wrong"),
    ]  # fmt: skip
    assert counts[0].height == counts[1].height == pytest.approx(2 * counts[2].height)
    curve = coverage_chart([(0.5, False), (0.9, True), (0.7, True), (0.6, False)])
    assert curve is not None
    titles = [s.title.split(": ")[1] for s in curve.shapes if isinstance(s, Dot)]
    assert titles == ["top-1 100 %", "top-1 100 %", "top-1 66.7 %", "top-1 50 %"]
    assert any(isinstance(s, Line) and s.role == "one" for s in curve.shapes)


def test_a_strip_is_a_row_of_the_models_frames(tmp_path):
    own = made_up(tmp_path)
    uri = next(uri for uri in written(own).references if uri.startswith("data:image/jpeg"))
    assert simplejpeg.decode_jpeg(base64.b64decode(uri.split(",")[1])).shape == (16, 3 * 18 - 2, 3)
    page = evaluation_page(own, CONTEXT, evaluation_drawings(own))
    assert page.count('alt="Frames of b/3.avi, which is Bowling, predicted Archery"') == 1


def test_a_model_is_called_by_its_run():
    assert run_name(Path("/w/people/model")) == "people"
    assert run_name(Path("/w/people/seed0-split1/model")) == "people/seed0-split1"
    assert run_name(Path("/elsewhere/mine")) == "mine"


@pytest.fixture(scope="module")
def series(trained, tmp_path_factory):
    """Two runs of one series: the model, and one that answers with the next class."""
    folder = tmp_path_factory.mktemp("series") / "people"
    for seed in (0, 1):
        shutil.copytree(trained.model, folder / f"seed{seed}-split1" / "model")
    second = folder / "seed1-split1" / "model"
    weights = load_file(second / "model.safetensors")
    names = ("classifier.weight", "classifier.bias")
    change_weights(second, **{name: weights[name].roll(1, 0) for name in names})
    return folder


def test_a_series_has_a_page_with_its_mean_and_every_run(series):
    own = EvalSettings(model=series, subset="train", num_workers=0, device="cpu", top_k=2)
    result = evaluate_series(own, series_models(series))
    assert result.report == series / "eval" / "train" / "report.html"
    shown = Page(result.report.read_text(encoding="utf-8"))
    assert all(value.startswith("data:") for value in shown.references)
    found = json.loads((series / "eval" / "train" / "summary.json").read_text())
    for name, title in (
        ("video_top1", "top-1"),
        ("macro_f1", "macro F1"),
        ("calibration_error", "calibration error"),
    ):
        mean, sd = html.percent(found["mean"][name]), html.percent(found["sd"][name])
        assert f"{title}{mean.removesuffix(' %')} ± {sd}" in shown.text
        values = [run[name] for run in found["runs"].values()]
        assert f"from {html.percent(min(values))} to {html.percent(max(values))}" in shown.text
    runs = [evaluate(own.model_copy(update={"model": model})) for model in series_models(series).values()]
    for label in COLOURS:
        videos, right = (sum(getattr(r.per_class[label], n) for r in runs) for n in ("videos", "right"))
        assert f"{label}{right} of {videos}" in shown.text
    assert "seed1-split1" in shown.text and (series / "eval" / "train" / "plots" / "runs.png").is_file()
    assert trouble_in_chromium(result.report) == []


def test_comparison_page_names_the_better_model_and_flipped_videos(series, tmp_path):
    models = tuple(series_models(series).values())
    own = EvalSettings(compare=models, subset="train", num_workers=0, device="cpu", output=tmp_path)
    result = compare(own)
    assert result.report == tmp_path / "comparison.html" and (tmp_path / "B" / "report.html").is_file()
    source = result.report.read_text(encoding="utf-8")
    shown = Page(source)
    assert all(value.startswith("data:") for value in shown.references)
    found = json.loads((tmp_path / "comparison.json").read_text())
    gained, lost = len(found["gained"]), len(found["lost"])
    assert gained != lost
    assert f"difference, points{100 * found['difference']:+.1f}" in shown.text
    assert f"gained, lost{gained}, {lost}of {found['videos']} videos" in shown.text
    assert f"McNemar’s test, p{found['p_value']:.3g}" in shown.text
    both = sum(
        a.is_right and b.is_right for a, b in zip(result.first.answers, result.second.answers, strict=True)
    )
    first, _ = result.names
    neither = found["videos"] - both - gained - lost
    assert f"{first} correct{both}{lost}{first} wrong{gained}{neither}" in shown.text
    assert source.count("<img ") == 2 * (min(gained, MOST_STRIPS) + min(lost, MOST_STRIPS))
    flip = (result.gained + result.lost)[0]
    for name, own in zip(result.names, flip, strict=True):
        assert f"{name}: {own.predicted}{html.percent(max(own.scores))}" in shown.text
    assert trouble_in_chromium(result.report, dark=True) == []


def made_up_comparison(folder, per_class):
    """A comparison by label -> (videos, correct predictions of the first model, of the second)."""
    first, second = (
        made_up(folder, ("x", "other"), metrics={"video_top1": top1}, name=name)
        for name, top1 in (("a", 0.5), ("b", 0.6))
    )

    def answer(own, is_right):
        return VideoPrediction(own, own.label if is_right else "other", (1.0, 0.0))

    pairs = tuple(
        (answer(own, n < a), answer(own, n < b))
        for label, (videos, a, b) in per_class.items()
        for n in range(videos)
        for own in [video(f"{label}{n}.avi", label)]
    )
    return Comparison(first, second, pairs, None, 0.5, folder)


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        ((0.1, 0.3), "is better"),
        ((-0.3, -0.1), "is worse"),
        ((-0.1, 0.3), "not significant"),
        (None, "of one group"),
    ],
)
def test_the_verdict_is_what_the_interval_allows(tmp_path, interval, sentence):
    own = replace(
        made_up_comparison(tmp_path, {"x": (5, 3, 3), "y": (5, 2, 3), "z": (4, 2, 1)}), interval=interval
    )
    drawings = comparison_drawings(own)
    text = Page(comparison_page(own, CONTEXT, drawings)).text
    assert (f"comes from {RESAMPLES:,} bootstrap resamples of whole groups" in text) == (interval is not None)
    assert sentence in text and "top-10.50000.6000+0.1000" in text
    chart = drawings["changed_classes"]
    assert chart is not None
    rows = chart.shapes
    # what lost most, first
    assert [s.text for s in rows if isinstance(s, Text) and s.anchor == "end"] == ["z", "y"]
    assert [s.role for s in rows if isinstance(s, Dot)] == ["dim", "bad", "dim", "good"]
    same = made_up_comparison(tmp_path, {"x": (5, 3, 3)})
    none = comparison_drawings(same)
    assert none == {"changed_classes": None}
    assert "No class changed" in Page(comparison_page(same, CONTEXT, none)).text


def test_report_removes_only_its_own_outdated_drawings(tmp_path):
    write_evaluation_report(made_up(tmp_path), CONTEXT)
    before = set((tmp_path / "plots").iterdir())
    own = tmp_path / "plots" / "changed_classes.png"
    write_comparison_report(made_up_comparison(tmp_path, {"x": (10, 5, 6)}), CONTEXT)
    assert own.is_file()
    write_comparison_report(made_up_comparison(tmp_path, {"x": (10, 5, 5)}), CONTEXT)
    assert set((tmp_path / "plots").iterdir()) == before


HUNDRED = tuple(f"Class {n}" for n in range(1, 101))


def of_100_classes(folder, per_class=4):
    """An evaluation of 100 classes; of each class, one video is mistaken for the next class."""
    scores = [tuple(0.9 if n == k else 0.001 for n in range(100)) for k in range(100)]
    answers = tuple(
        VideoPrediction(video(f"{label} {n}.avi", label), HUNDRED[said], scores[said])
        for k, label in enumerate(HUNDRED)
        for n in range(per_class)
        for said in [(k + (n == 0)) % 100]
    )
    per = {
        label: ClassScore(per_class, per_class - 1 - k // 50, per_class) for k, label in enumerate(HUNDRED)
    }
    confused = tuple(zip(HUNDRED[:9], HUNDRED[1:], [1] * 9, strict=False))
    return made_up(folder, HUNDRED, answers=answers, per_class=per, confused=confused)


def test_training_and_evaluation_pages_link_to_each_other(trained, tmp_path):
    model = Path(shutil.copytree(trained.run, tmp_path / "runs & <b>" / "mine")) / "model"
    training = model.parent / "report.html"
    result = evaluate(settings(trained, model=model))
    assert "../../report.html" in page_of(result).links
    assert "eval/test/report.html" in Page(training.read_text()).links
    other = shutil.copytree(model.parent, tmp_path / "runs & <b>" / "o'ther") / "model"
    compared = compare(EvalSettings(compare=(model, other), num_workers=0, device="cpu"))
    assert compared.report is not None
    for page in (compared.report, training, other.parent / "report.html", compared.second.report):
        links = [link for link in Page(page.read_text()).links if link.endswith(".html")]
        targets = [(page.parent / unquote(link)).resolve() for link in links]
        assert all(target.is_file() for target in targets)
        assert page == compared.report or compared.report.resolve() in targets
    (result.output / "report.html").unlink()
    (other.parent / "report.html").write_text("<nav>mine</nav>")
    compare(EvalSettings(compare=(model, other), num_workers=0, device="cpu"))
    assert "eval/test/report.html" not in Page(training.read_text()).links
    assert (other.parent / "report.html").read_text() == "<nav>mine</nav>"


def test_confusion_cells_open_lists_of_their_videos(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    answers = []
    for answer in made_up(tmp_path).answers:
        name = answer.video.name.replace("0", "<i> #?%41")
        (tmp_path / name).touch()
        answers.append(replace(answer, video=replace(answer.video, path=tmp_path / name, name=name)))
    page = written(made_up(tmp_path / "eval", answers=tuple(answers)))
    assert {"#c0-0", "#c1-0", "../b/3.avi", "../b/%3Ci%3E%20%23%3F%2541.avi"} <= set(page.links)
    assert "Bowling: 1 of 2 predicted Archeryb/3.avi · 97\u00a0%" in page.text.replace("\n", "")
    monkeypatch.setattr(evaluation, "MOST_IN_CELL", 2)
    monkeypatch.setattr(evaluation, "MOST_LISTED", 150)
    text = written(of_100_classes(tmp_path)).text
    assert text.count("\u00a0%Class") <= 150 and text.count(", of which 1 are listed") == 50
    assert all(f"Class {n}: 1 of 4 predicted Class {n % 100 + 1}" in text for n in range(1, 101))


def test_clips_play_as_loops_of_the_frames_of_the_model(tmp_path):
    clips = Clips()
    clips.clip = lambda name: torch.linspace(-2, 2, 5).view(5, 1, 1, 1).expand(5, 3, 200, 200)  # type: ignore[method-assign]
    page = written(made_up(tmp_path, clips=clips))
    loops = [uri for uri in page.references if uri.startswith("data:image/webp")]
    assert len(loops) == 4
    with Image.open(io.BytesIO(base64.b64decode(loops[0].split(",")[1]))) as loop:
        assert (loop.n_frames, loop.info["loop"], loop.size) == (5, 0, (128, 128))  # type: ignore[attr-defined]
        levels = []
        for frame in range(5):
            loop.seek(frame)
            levels.append(loop.convert("L").getpixel((64, 64)))
    assert levels == sorted(levels) and levels[0] < levels[-1] - 200


def test_a_page_of_100_classes_sorts_filters_and_opens_cells(tmp_path):
    own = of_100_classes(tmp_path)
    path = tmp_path / "report.html"
    path.write_text(evaluation_page(own, CONTEXT, evaluation_drawings(own)))
    assert path.stat().st_size < 700_000
    with opened_in_chromium(path, width=390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        names = page.locator("table.sortable tbody tr:visible td:first-child")
        head = page.locator("table.sortable th").first
        assert names.all_inner_texts()[:2] == ["Class 51", "Class 52"]  # the worst first
        head.get_by_role("button").focus()
        for order, first in (("ascending", "Class 1"), ("descending", "Class 100")):
            page.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == order and names.first.inner_text() == first
        assert names.all_inner_texts() == list(reversed(HUNDRED))
        page.locator("table.sortable th button", has_text="correct").click()
        assert names.first.inner_text() == "Class 100" and head.get_attribute("aria-sort") is None
        page.get_by_placeholder("Filter 100 rows").fill("class 7")
        assert sorted(names.all_inner_texts()) == sorted(n for n in HUNDRED if n.startswith("Class 7"))
        page.locator(".matrix tbody th").nth(50).scroll_into_view_if_needed()
        assert page.locator(".matrix thead th").nth(50).bounding_box()["y"] >= 0  # the header stays
        page.locator(".matrix a[href='#c1-2']").click()
        assert page.locator(".cell:visible li").all_inner_texts() == ["Class 2 0.avi · 90\u00a0%"]
        page.keyboard.press("Escape")
        assert page.locator(".cell:visible").count() == 0
        page.get_by_label("Fit to the width").check()
        assert page.evaluate("document.querySelector('.matrix').scrollWidth") <= 390


def test_names_with_numbers_are_in_natural_order(tmp_path):
    labels = ("Class 10", "Class 2", "class 1")
    assert shown_classes(labels, {(label, label): 1 for label in labels}) == [
        "class 1",
        "Class 2",
        "Class 10",
    ]
    assert [label for label, _ in worst_first(dict.fromkeys(labels, (2, 1)))] == list(reversed(labels))
    text = Page(
        comparison_page(
            made_up_comparison(tmp_path, dict.fromkeys(labels, (4, 1, 1))), CONTEXT, {"changed_classes": None}
        )
    ).text
    assert text.index("class 14") < text.index("Class 24") < text.index("Class 104")
