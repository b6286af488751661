"""Training reports: self-contained pages, readable charts, true numbers."""

import base64
import io
import json
import math
import subprocess
from itertools import pairwise

import pytest
import simplejpeg
import torch
from pages import Page, trouble_in_chromium
from PIL import Image
from tiny import COLOURS, SCRATCH, run, settings

from tvit_cli.data.augment import eval_transform
from tvit_cli.engine.train import train
from tvit_cli.report import html, training
from tvit_cli.report.charts import MOST_POINTS, Curve, curves_chart, thinned
from tvit_cli.report.drawing import PALETTE, Box, Dot, Drawing, Line, Text, text_width, ticks, to_png, to_svg
from tvit_cli.report.film import Samples, film_strip, spread, to_pixels
from tvit_cli.report.html import Context
from tvit_cli.report.training import curves, training_page
from tvit_cli.results import Note, TrainResult
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.train import TrainSettings


@pytest.fixture(scope="module")
def result(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run(path_to_data=str(clips), working_directory=folder, epochs=3, test_at_end=True, **SCRATCH)


DEVICE = torch.device("cpu")
PREPROCESSING = Preprocessing(n_frames=4, frame_size=16)


def trained(folder, **changes):
    """The result of a training of two epochs that has no run."""
    epochs = [
        {"epoch": n, "step": 3 * n, "train_loss": 2.0 / n, "train_clip_top1": 0.4 * n, "val_loss": 1.5 / n,
         "val_video_top1": 0.3 * n, "val_video_top5": 1.0, "seconds": 60.0, "clips_per_second": 9.0 + n,
         "data_wait": 0.25}
        for n in (1, 2)
    ]  # fmt: skip
    steps = [
        {"epoch": 1 + n // 3, "step": n + 1, "train_loss": 2.0, "learning_rate": 1e-4, "grad_norm": 3.0}
        for n in range(6)
    ]
    values = {
        "run": folder, "model": folder / "model", "best_epoch": 2, "best": epochs[1], "test": None,
        "epochs": epochs, "steps": steps, "per_class": {"Archery": (4, 3), "Bowling": (4, 1)},
        "videos": {"Archery": {"train": 8, "val": 4}, "Bowling": {"train": 7, "val": 4, "test": 2}},
        "parameters": (1_234, 5_678_901),
    }  # fmt: skip
    return TrainResult(**{**values, **changes})


def page_of(result, samples=None, evil="here"):
    """The page of a result, with all its charts."""
    context = Context({evil: evil}, [(evil, evil)], DEVICE)
    settings = TrainSettings(epochs=2, lora_rank=3)
    charts = curves(result).values()
    return Page(training_page(result, settings, samples or Samples(), PREPROCESSING, context, charts))


def test_a_training_leaves_a_page_that_refers_to_nothing_outside_itself(result):
    assert result.report == result.run / "report.html"
    shown = Page(result.report.read_text(encoding="utf-8"))
    assert shown.references and all(value.startswith("data:") for value in shown.references)
    assert not shown.tags & {"iframe", "object"} and shown.scripts == [html.SCRIPT]
    assert set(shown.links) >= {"eval/test/report.html"}
    assert "url(" not in shown.text and "@import" not in shown.text
    for name in COLOURS:
        assert name in shown.text
    for word in ("Test", "--img-size", "torch", "processor", f"tvit eval --model {result.model}"):
        assert word.lower() in shown.text.lower()


def test_a_browser_without_a_network_finds_nothing_wrong_with_the_page(result):
    assert result.report is not None
    assert trouble_in_chromium(result.report) == []


def test_the_page_says_what_the_metrics_say(result):
    assert result.report is not None and result.test is not None
    text = Page(result.report.read_text(encoding="utf-8")).text
    lines = map(json.loads, (result.run / "metrics.jsonl").read_text().splitlines())
    epochs = [r for r in lines if r["kind"] == "epoch"]
    best = epochs[result.best_epoch - 1]
    assert f"test top-1{html.percent(result.test.metrics['video_top1'])}" in text
    assert f"val top-1{html.percent(best['val_video_top1'])}best epoch, {result.best_epoch} of 3" in text
    for record in epochs:
        assert f"epoch {record['epoch']}: val {record['val_loss']:.3g}" in text
    counted = json.loads((result.run / "val_per_class.jsonl").read_text().splitlines()[result.best_epoch - 1])
    assert counted["step"] == best["step"]
    assert (
        sum(right for _, right in counted["classes"].values()) == best["val_video_top1"] * best["val_videos"]
    )
    for name, (videos, right) in counted["classes"].items():
        assert f"{name}{right} of {videos}" in text


def test_the_curves_lie_beside_the_page_as_pictures(result):
    names = {path.stem for path in (result.run / "plots").iterdir()}
    assert names == {"loss", "accuracy", "learning_rate", "gradient_norm", "throughput", "data_wait"}
    with Image.open(result.run / "plots" / "loss.png") as picture:
        assert picture.size[0] == 840
        colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in picture.getcolors(1 << 24) or []}
    assert {PALETTE["one"][0], PALETTE["two"][0], PALETTE["ink"][0]} <= colours


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.8}], ids=["plain", "mixed"])
def test_the_samples_are_what_the_model_was_given(clips, tmp_path, monkeypatch, changes):
    from tvit_cli.portable.vit import TemporalViT

    given = []
    real = TemporalViT.forward

    def forward(self, clips):
        if self.training:
            given.extend(clips.clone())
        return real(self, clips)

    kept = []
    monkeypatch.setattr(TemporalViT, "forward", forward)
    monkeypatch.setattr(training, "write_training_report", lambda *given: kept.append(given[2]))
    run(path_to_data=str(clips), working_directory=tmp_path, epochs=1, **changes, **SCRATCH)
    assert len(kept[0].clips) == 6
    for (clip, caption, path), own in zip(kept[0].clips, given, strict=False):
        assert torch.equal(clip, own)
        parts = caption.split(", mixed with ")
        assert len(parts) == (2 if changes else 1)
        for part in parts:
            label, name = part.split(" · ")
            assert name.startswith(f"v_{label}_") and path.is_file()


def test_a_report_that_cannot_be_written_costs_no_training(clips, tmp_path, monkeypatch):
    def full(drawing):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "to_png", full)
    events = []
    facts = settings(path_to_data=str(clips), working_directory=tmp_path, epochs=1, **SCRATCH)
    done = train(facts, events.append)
    assert done.report is None and (done.model / "card.json").is_file()
    assert any("report could not be written (No space left" in e.text for e in events if isinstance(e, Note))


def test_names_from_outside_are_text_and_never_markup(tmp_path):
    evil = '<script>alert("1")</script>&'
    own = trained(
        tmp_path / "run", problem=evil, per_class={evil: (2, 1)}, videos={evil: {"train": 1}},
        unreadable={evil: evil},
    )  # fmt: skip
    shown = page_of(own, Samples(clips=[(torch.zeros(2, 3, 16, 16), evil, tmp_path / evil)]), evil)
    assert shown.scripts == [html.SCRIPT]
    assert shown.text.count(evil) >= 8


def test_classes_stand_worst_first_and_settings_that_differ_are_told_apart(tmp_path):
    text = page_of(trained(tmp_path / "run")).text
    assert text.index("Bowling1 of 425 %") < text.index("Archery3 of 475 %")
    assert f"2 of {len(TrainSettings.model_fields)} differ" in text
    assert "--lora-rank38" in text and "--epochs2300" in text


def test_settings_that_equal_their_computed_defaults_are_not_listed(tmp_path):
    same = {"hf_model_name": None, "patch_size": 16, "train": "all", "mixed_precision": "no"}
    context = Context({}, [], DEVICE)
    text = training_page(trained(tmp_path), TrainSettings(**same), Samples(), PREPROCESSING, context, [])
    assert "1 of " in text and Page(text).text.count("--hf-model-namenone") == 2
    assert Page(text).text.count("--patch-size1616") == 1


def test_a_run_without_validation_shows_what_there_is(tmp_path):
    own = trained(tmp_path / "run")
    own = trained(
        tmp_path / "run",
        best={},
        per_class={},
        epochs=[{k: v for k, v in r.items() if not k.startswith("val_")} for r in own.epochs],
        unreadable={f"clip{n}.avi": "empty" for n in range(60)},
    )
    text = page_of(own).text
    assert "Validation accuracy by class" not in text and "train loss1last epoch, 2" in text
    assert "60 videos cannot be read" in text and "clip49.avi" in text and "clip50.avi" not in text


def boxes(drawing):
    """Left, top, right, bottom of every text."""
    found = []
    for shape in drawing.shapes:
        if isinstance(shape, Text):
            width = text_width(shape.text, shape.size)
            left = shape.at[0] - {"start": 0, "middle": width / 2, "end": width}[shape.anchor]
            found.append((left, shape.at[1] - 0.75 * shape.size, left + width, shape.at[1], shape.text))
    return found


@pytest.mark.parametrize("epochs", [1, 2, 14, 300])
@pytest.mark.parametrize("peak", [1e-7, 0.8, 1234.0])
def test_no_text_of_a_chart_overlaps_another_or_leaves_the_sheet(epochs, peak):
    points = [(n, peak / n) for n in range(1, epochs + 1)]
    names = ("train clip top-1", "val top-1", "val top-5")
    chart = curves_chart(
        "Gradient norm, before clipping",
        [Curve(name, points, role) for name, role in zip(names, ("one", "two", "three"), strict=True)],  # type: ignore[arg-type]
        x_name="epoch",
        show=html.number,
        mark=(epochs, "best"),
    )
    assert chart is not None
    texts = boxes(chart)
    for left, top, right, bottom, text in texts:
        assert left >= 0 and top >= 0 and right <= chart.width + 4 and bottom <= chart.height, text
    for number, (left, top, right, bottom, text) in enumerate(texts):
        for other in texts[number + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (text, other[4])


def test_every_point_of_a_chart_lies_inside_its_axes():
    points = [(n, math.sin(n) * 3) for n in range(1, 30)]
    points[7] = (8, None)
    chart = curves_chart("x", [Curve("c", points, "one")], x_name="step", show=str)
    assert chart is not None
    lines = [shape for shape in chart.shapes if isinstance(shape, Line) and shape.role == "one"]
    assert [len(line.points) for line in lines] == [7, 21]  # the gap
    for x, y in (point for line in lines for point in line.points):
        assert 50 < x < chart.width - 10 and 40 < y < chart.height - 30
    titles = [shape.title for shape in chart.shapes if isinstance(shape, Dot)]
    assert len(titles) == 28 and titles[0] == f"step 1: c {math.sin(1) * 3}"
    assert curves_chart("x", [Curve("c", [(1, None), (2, math.nan)], "one")], x_name="", show=str) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 0.83, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 14, [0, 5, 10, 15]), (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 2, [-3, -2, -1, 0, 1, 2])],
)  # fmt: skip
def test_ticks_are_round_numbers_around_the_range(low, high, expected):
    assert ticks(low, high, 5) == expected


def test_ticks_cover_any_range_and_long_curves_keep_their_extremes():
    for power in range(-9, 10):
        for high in (1.0, 1.7, 3.3, 9.9):
            found = ticks(0, high * 10.0**power, 5)
            assert found[0] <= 0 and found[-1] >= high * 10.0**power * (1 - 1e-9) and 2 <= len(found) <= 6
            gaps = [b - a for a, b in pairwise(found)]
            assert max(gaps) == pytest.approx(min(gaps))
    assert ticks(0, 3, 8, whole=True) == [0, 1, 2, 3]
    points = [(float(n), math.sin(n / 90)) for n in range(6000)]
    points[2345] = (2345.0, 50.0)
    (run_,) = thinned(points)
    assert len(run_) <= MOST_POINTS + 4 and run_ == sorted(run_)
    assert {points[0], points[-1], (2345.0, 50.0)} <= set(run_)
    assert thinned(points[:5]) == [points[:5]]


def test_shapes_are_drawn_alike_as_svg_and_as_png():
    shapes = [
        Box((0, 0), 20, 10, "bad", title="a < b"),
        Line([(0, 15), (20, 15)], "good", 3),
        Line([(0, 25), (40, 25)], "one", 2, dashed=True),
        Dot((30, 5), 4, "two"),
        Text((40, 38), "text", "ink", 10, "end"),
        Text((38, 30), "I", "ink", 12, "middle", turned=True),
    ]
    drawing = Drawing("all shapes", 40, 40, shapes)
    svg = to_svg(drawing)
    assert svg.count("<polyline") == 2 and 'stroke-dasharray="4 4"' in svg
    assert "<title>a &lt; b</title>" in svg
    assert 'transform="rotate(-90 38 30)"' in svg
    assert 'text-anchor="end"' in svg and '<circle class="f-two" cx="30" cy="5" r="4"/>' in svg
    with Image.open(io.BytesIO(to_png(drawing, scale=2))) as picture:
        assert picture.size == (80, 80)

        def colour(x, y):
            return "#{:02x}{:02x}{:02x}".format(*picture.getpixel((round(2 * x), round(2 * y))))  # type: ignore[misc]

        assert colour(10, 5) == PALETTE["bad"][0] and colour(10, 15) == PALETTE["good"][0]
        assert colour(30, 5) == PALETTE["two"][0] and colour(30, 15) == "#ffffff"
        dark = [x for x in range(60, 80) for y in range(50, 70) if sum(picture.getpixel((x, y))) < 300]  # type: ignore[arg-type]
        assert len(dark) > 20 and max(dark) - min(dark) > 10  # the I lies on its side
        row = [colour(x, 25) for x in range(40)]
        assert 15 < sum(int(value[1:3], 16) > 140 for value in row) < 25  # every second dash
    with Image.open(io.BytesIO(to_png(drawing, scale=2, dark=True))) as picture:
        assert colour(10, 5) == PALETTE["bad"][1] and colour(30, 15) == PALETTE["paper"][1]


def test_film_strips_show_the_frames_that_normalisation_was_given():
    card = Preprocessing(n_frames=3, frame_size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    clip = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    given = eval_transform([clip], preprocessing=card, device=torch.device("cpu"))[0]
    assert torch.equal(to_pixels(given, card), clip)
    card = Preprocessing(n_frames=3, frame_size=200, mean=(0, 0, 0), std=(1, 1, 1))
    clip = torch.stack([torch.full((3, 200, 200), level) for level in (0.0, 0.5, 1.0)])
    uri = film_strip(clip, card)
    picture = simplejpeg.decode_jpeg(base64.b64decode(uri.split(",")[1]))
    assert picture.shape == (128, 3 * 130 - 2, 3)
    assert [int(picture[64, 64 + 130 * n, 0]) for n in range(3)] == pytest.approx([0, 128, 255], abs=2)
    assert spread(torch.arange(33), 5).tolist() == [0, 8, 16, 24, 32]


def test_a_table_marks_the_rows_it_is_told_to_and_numbers_stand_right():
    parts = html.TEMPLATES.globals["parts"]
    text = parts.table(("a", "b"), [("x", 1), ("y", 2)], changed=[1])
    assert text.count('class="changed"') == 1 and text.count('class="number"') == 2
    assert parts.table(("a",), []) == "" and parts.section("empty", caller=lambda: "\n") == ""


def test_the_commit_of_a_working_tree_is_found_and_its_absence_is_no_error(tmp_path, monkeypatch):
    assert html.git_commit(tmp_path) == ""
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]):  # fmt: skip
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = html.git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "a").write_text("1")
    subprocess.run(["git", "-C", str(tmp_path), "add", "a"], check=True)
    assert html.git_commit(tmp_path) == f"{commit}, with uncommitted changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert html.git_commit(tmp_path) == ""
    assert {"tvit", "torch", "python", "system"} <= html.software(tmp_path).keys()
    assert html.hardware(torch.device("cpu"))["processor"]
