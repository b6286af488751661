"""Timelines and live sources: sliding windows, smoothing, shot boundaries, segments, files."""

import csv
import errno
import io
import itertools
import json
import math
import os
import re
import runpy
import sys
import threading
import time
import tracemalloc
import wave
import weakref
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from loopback import rtsp_serving, serving
from numpy.typing import NDArray
from PIL import Image
from tiny import make_model
from torch import Tensor, nn

from tvit_cli import commands
from tvit_cli.console import Console
from tvit_cli.data import live
from tvit_cli.data.live import find_live
from tvit_cli.data.video import TimedFrame, iter_frames, read_clip
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.predict import (
    Model,
    find_stream,
    folder_names,
    predict_stream,
    predict_timelines,
    stream,
)
from tvit_cli.engine.predict import timeline as timeline_module
from tvit_cli.engine.predict.stream import StreamFiles
from tvit_cli.engine.predict.timeline import (
    SUBTITLES,
    SegmentFinder,
    ShotBoundaries,
    frame_positions,
    prefetch,
    sliding_windows,
    smooth,
    subtitles,
    write_timeline,
)
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, Interrupted, RunError, SettingsError, TvitError, VideoError
from tvit_cli.model.folder import save_model
from tvit_cli.portable.reading import segment_indices
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.report.drawing import PALETTE
from tvit_cli.report.film import clock, timeline_png
from tvit_cli.results import Note, Segment, Span, Timeline, WindowPrediction, silent
from tvit_cli.settings.base import load
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.predict import PredictSettings

LABELS = ("dark", "grey", "light")
RATE = 10


def film(seconds, rate=RATE, converted=lambda number, frame: None):
    """Frames of one pixel whose value is their number."""
    for number in range(round(seconds * rate)):

        def picture(number=number):
            frame = np.full((1, 1, 3), number % 256, np.uint8)
            converted(number, frame)
            return frame

        yield TimedFrame(number / rate, (number + 1) / rate, seconds, picture)


class Brightness(nn.Module):
    """Scores a clip by how bright it is, whatever its size: 60, 130 and 200 are the three classes' own."""

    def forward(self, clips: Tensor) -> Tensor:
        level = clips.mean(dim=(1, 2, 3, 4))[:, None] * 255
        return -((level - torch.tensor([60.0, 130.0, 200.0])) ** 2) / 200


class FirstFrame(Brightness):
    """Scores a clip by its first frame alone: windows over a boundary show what lies before it."""

    def forward(self, clips: Tensor) -> Tensor:
        return super().forward(clips[:, :1])


def model_of(network, n_frames=4):
    card = ModelCard(
        tvit_version="0",
        labels=LABELS,
        model={"num_classes": 3},
        preprocessing=Preprocessing(n_frames=n_frames, frame_size=16, mean=(0, 0, 0), std=(1, 1, 1)),
        weights_sha256="",
    )
    return Model(Trained(network, card, Path("fake"), torch.device("cpu")))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """3 s dark, 4 s light, 3 s grey."""
    levels = np.repeat([60, 200, 130], [3 * RATE, 4 * RATE, 3 * RATE]).astype(np.uint8)
    path = tmp_path_factory.mktemp("day") / "day.mp4"
    write_video(
        path, np.broadcast_to(levels[:, None, None, None], (len(levels), 32, 48, 3)).copy(), rate=RATE
    )
    return path


def card(n_frames, grid=None):
    return Preprocessing(n_frames=n_frames, frame_grid=grid, frame_size=8)


@pytest.mark.parametrize(
    ("frames", "n_frames", "grid"), [(24, 8, None), (30, 4, None), (17, 5, None), (32, 4, 8)]
)
def test_a_window_as_long_as_the_video_has_the_frames_of_the_evaluation(frames, n_frames, grid):
    (window,) = sliding_windows(
        film(frames / 12, 12),
        length=frames / 12,
        stride=1e3,
        positions=frame_positions(card(n_frames, grid), frames / 12),
    )
    expected = segment_indices(frames, n_frames, grid=grid)
    assert window.frames()[:, 0, 0, 0].tolist() == expected
    assert window.frames().shape == (n_frames, 1, 1, 3)


def test_windows_begin_every_stride_and_end_within_the_video():
    windows = list(sliding_windows(film(5), length=2, stride=0.5, positions=frame_positions(card(4), 2)))
    assert [w.start for w in windows] == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    for w in windows:
        assert w.frames()[:, 0, 0, 0].tolist() == [round(RATE * w.start) + n for n in (2, 7, 12, 17)]
    assert not list(sliding_windows(film(5), length=5.01, stride=1, positions=[0.5]))


def test_an_hour_is_converted_once_and_held_for_a_window_only():
    numbers = []
    alive = weakref.WeakValueDictionary()
    most = count = 0

    def converted(number, frame):
        nonlocal most
        numbers.append(number)
        alive[number] = frame
        most = max(most, len(alive))

    for window in sliding_windows(
        film(3600, converted=converted), length=2, stride=0.5, positions=frame_positions(card(4), 2)
    ):
        count += 1
        assert len(window.pictures) == 4
    assert count == 3598 * 2 + 1
    assert len(numbers) == len(set(numbers))
    # Windows share what they show: every fifth frame. The window that was given last is still held here.
    assert most <= 2 * RATE // 5 + 1


def test_a_frame_that_is_shown_for_years_fills_no_memory():
    grey = np.full((1, 1, 3), 7, np.uint8)
    played = [TimedFrame(0, 3e8, 3e8, lambda: grey)]
    windows = sliding_windows(played, length=2, stride=0.5, positions=frame_positions(card(4), 2))
    tracemalloc.start()
    try:
        found = list(itertools.islice(windows, 1000))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert [w.start for w in found] == [n / 2 for n in range(1000)]
    assert all((w.frames() == 7).all() for w in found)


def test_frames_of_a_video_are_played_without_gaps(tmp_path, make_video, packed_xvid):
    path = make_video(tmp_path / "a.mp4", frames=9, rate=10)
    played = list(iter_frames(path))
    assert [p.start for p in played] == pytest.approx([n / 10 for n in range(9)])
    assert all(a.end == b.start for a, b in itertools.pairwise(played))
    assert played[-1].end == pytest.approx(0.9)
    clip = read_clip(path, lambda count: range(count))
    pictures = [p.picture() for p in iter_frames(path)]
    assert np.array_equal(np.stack(pictures), clip.frames)
    assert next(iter_frames(path, short_side=24)).picture().shape == (24, 32, 3)
    odd = list(iter_frames(packed_xvid))  # whose times go back
    assert len(odd) == 39 and all(p.end > p.start for p in odd)
    assert odd[-1].end == pytest.approx(39 / 25, abs=0.1)
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(VideoError, match=r"text.avi: not a video"):
        next(iter_frames(tmp_path / "text.avi"))


def test_smoothing_is_the_mean_of_the_windows_over_each_cell():
    scores = np.eye(5)  # five windows, each of a class of its own
    found = smooth(scores, window=2, stride=1, cells=7)
    assert found[0].tolist() == [1, 0, 0, 0, 0]
    assert found[3].tolist() == [0, 0, 0.5, 0.5, 0]
    assert found[5].tolist() == found[6].tolist() == [0, 0, 0, 0, 1]  # the last window's, and behind it
    assert smooth(scores, window=1.5, stride=1, cells=5)[2] == pytest.approx([0, 1 / 3, 2 / 3, 0, 0])
    assert smooth(scores, window=0.5, stride=1, cells=5).tolist() == scores.tolist()


def segments(scores, *, window, stride, penalty, end, cuts=(), at_once=1000, labels=LABELS):
    """The segments of windows, and how many windows were scored when each was certain."""
    given = ShotBoundaries(times=list(cuts), decided=1e9)
    finder = SegmentFinder(labels, window=window, stride=stride, penalty=penalty, cuts=given)
    found, when = [], []
    for first in range(0, len(scores), at_once):
        found += finder.add(scores[first : first + at_once])
        when += [finder.windows] * (len(found) - len(when))
    return found + finder.finish(end), when


def test_segments_as_they_come_are_those_of_the_best_of_all_paths():
    generator = np.random.default_rng(3)
    for penalty, cuts in ((0.0, ()), (0.7, (2.1, 4.4)), (2.0, (1.0, 3.6)), (9.0, ())):
        scores = generator.dirichlet([1, 1, 1], 6)

        def gain(path, scores=scores, penalty=penalty, cuts=cuts):
            near = [math.floor(cut + 0.5) for cut in cuts]
            changes = sum((0.5 if n in near else 1) for n in range(1, 6) if path[n] != path[n - 1])
            return sum(np.log(scores[n, label]) for n, label in enumerate(path)) - penalty * changes

        best = max(itertools.product(range(3), repeat=6), key=gain)
        for at_once in (1, 6):
            found, _ = segments(
                scores, window=1, stride=1, penalty=penalty, end=6, cuts=cuts, at_once=at_once
            )
            path = [LABELS.index(s.label) for s in found for _ in range(round(s.end - s.start))]
            assert tuple(path) == best


def test_a_segment_is_certain_once_another_label_has_begun():
    scores = np.full((60, 3), 0.05)
    scores[range(60), np.repeat([0, 2, 0], 20)] = 0.9
    common = {"window": 2, "stride": 0.5, "penalty": 8, "end": 31.5}
    (first, second, last), when = segments(scores, at_once=1, **common)
    assert (first.label, second.label, last.label) == ("dark", "light", "dark")
    assert first.end == pytest.approx(11, abs=0.5) and when[0] <= 20 + 12 and when[1] <= 40 + 12
    assert segments(scores, **common)[0] == [first, second, last]


def test_sure_windows_leave_a_boundary_open_and_a_cut_tells_it():
    # windows of 2 s over 12 s; what begins before 6 s is seen as the first label alone
    starts = np.arange(21) * 0.5
    scores = np.where((starts < 6)[:, None], [0.99, 0.01, 0], [0.01, 0.99, 0])

    def boundaries(cuts):
        found, _ = segments(scores, window=2, stride=0.5, end=12, penalty=8, cuts=cuts)
        assert [segment.label for segment in found] == ["dark", "grey"]
        return [segment.start for segment in found[1:]]

    assert abs(boundaries([])[0] - 6.75) <= 0.25  # the middle of what is open, 5.5 s to 8 s, on the grid
    assert boundaries([6.0]) == [6.0]
    assert boundaries([2.0, 4.0, 6.0, 8.0]) == [6.0]  # the likeliest of the cuts that are open
    assert boundaries([3.0]) == boundaries([10.0]) == boundaries([])  # the scores speak against these


def test_a_moment_of_a_third_label_goes_to_its_neighbours():
    a, b, c = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.15, 0.25, 0.6]
    scores = np.array([a, a, a, c, b, b, b])
    kept, _ = segments(scores, window=0.5, stride=0.5, end=3.4, penalty=0)
    assert [s.label for s in kept] == ["dark", "light", "grey"]
    (first, second), _ = segments(scores, window=0.5, stride=0.5, end=3.4, penalty=2)
    assert (first.label, first.start, first.end) == ("dark", 0, 1.5)
    assert (second.label, second.start, second.end) == ("grey", 1.5, 3.4)
    assert second.score == pytest.approx((0.25 + 3 * 0.8) / 4)


def test_boundaries_are_found_within_a_stride_and_half_lie_on_either_side(day):
    seen = []
    timeline = model_of(Brightness()).timeline(
        day, window=1.0, stride=0.25, batch_size=3, progress=lambda *p: seen.append(p)
    )
    assert [s.label for s in timeline.segments] == ["dark", "light", "grey"]
    found = [s.start for s in timeline.segments[1:]]
    assert found == pytest.approx([3, 7], abs=0.25)
    assert timeline.segments[0].start == 0
    assert timeline.segments[-1].end == timeline.seconds == pytest.approx(10)
    assert timeline.scores.shape == (37, 3) and timeline.smoothed.shape == (40, 3)
    assert seen[-1] == (pytest.approx(10), pytest.approx(10, abs=0.2)) and len(seen) == 13


def test_boundaries_lie_at_cuts_in_any_batches_and_with_smoothing(day):
    timeline = model_of(FirstFrame()).timeline(day, window=2.0, stride=0.5)
    assert [(s.label, s.start) for s in timeline.segments] == [("dark", 0), ("light", 3), ("grey", 7)]
    blind, _ = segments(timeline.scores, window=2, stride=0.5, end=10, penalty=8)
    assert all(s.start >= at + 0.5 for s, at in zip(blind[1:], (3, 7), strict=True))  # without them
    model = model_of(Brightness())
    one, many = (model.timeline(day, window=1.0, stride=0.2, batch_size=n) for n in (1, 16))
    assert one.segments == many.segments and np.array_equal(one.scores, many.scores)
    raw = model.timeline(day, window=1.0, stride=0.2, smoothing=0)
    assert len(raw.segments) > len(one.segments)  # between dark and light lies a moment of grey


def test_a_short_video_is_the_clip_that_predict_sees_or_an_error(day, tmp_path):
    model = model_of(Brightness(), n_frames=8)
    timeline = model.timeline(day, window=60.0)
    (segment,) = timeline.segments
    label, score = model.predict(day).labels[0]
    assert segment.label == label and segment.score == pytest.approx(score, abs=1e-12)
    assert (segment.start, segment.end) == (0, timeline.seconds)
    assert timeline.window == timeline.stride == timeline.seconds
    (tmp_path / "none.mp4").write_text("nothing")
    with pytest.raises(VideoError, match=r"none.mp4"):
        model_of(Brightness()).timeline(tmp_path / "none.mp4")


def test_work_ahead_is_bounded_and_ends_when_nobody_wants_the_rest():
    made = []
    before = threading.active_count()
    items = prefetch((made.append(n) or n for n in range(1000)), depth=2)  # type: ignore[func-returns-value]
    assert next(items) == 0
    deadline = time.monotonic() + 20
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 3 <= len(made) <= 4  # one taken, two waiting, one in hand
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert list(prefetch(range(50))) == list(range(50))


def test_times_are_read_and_shown_as_people_write_them():
    assert [clock(s) for s in (0, 7.5, 59.96, 3671)] == ["0:00", "0:07.5", "1:00", "1:01:11"]
    places = [Path("a/x.mp4"), Path("b/x.avi"), "http://host/..", "http://host/y.mp4?z=1"]
    assert list(folder_names(places)) == ["x", "x-2", "video", "y"]


@pytest.mark.parametrize(
    ("stems", "names"),
    [(("a", "a", "a-2"), ["a", "a-2", "a-2-2"]), (("a-2", "a", "a", "a"), ["a-2", "a", "a-3", "a-4"])],
)
def test_timelines_have_distinct_folders_despite_numbered_names(stems, names):
    assert list(folder_names([Path(f"{n}/{stem}.mp4") for n, stem in enumerate(stems)])) == names


def test_the_picture_has_frames_and_a_lane_of_each_label(day):
    timeline = model_of(Brightness()).timeline(day, window=1.0, stride=0.25)
    image = Image.open(io.BytesIO(timeline_png(timeline)))
    assert image.size == (2000, 2 * (72 + 12 + 3 * 22 + 26))
    pixels = np.asarray(image.convert("L")).astype(int)
    dark = Image.open(io.BytesIO(timeline_png(timeline, dark=True)))
    assert "#{:02x}{:02x}{:02x}".format(*dark.getpixel((2, 2))) == PALETTE["paper"][1]  # type: ignore[misc]
    strip = pixels[80, 200:1940]
    assert abs(strip[50] - 60) < 12 and abs(strip[len(strip) // 2] - 200) < 12 and abs(strip[-50] - 130) < 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "model"
    config = ViTConfig(num_classes=3, frame_size=16, patch_size=8, n_frames=4, width=8, depth=1, num_heads=1)
    model = build_model(config, seed=0, from_scratch=True)
    card = ModelCard(
        tvit_version="0", labels=LABELS, model=config.to_dict(),
        preprocessing=Preprocessing(n_frames=4, frame_size=16), weights_sha256="",
    )  # fmt: skip
    save_model(path, model.state_dict(), card)
    return path


def test_class_names_in_a_timeline_are_no_formulas(tmp_path, monkeypatch):
    monkeypatch.setattr("tvit_cli.report.film.timeline_png", lambda timeline: b"")
    scores = np.array([[0.9, 0.1]])
    facts = {"segments": (), "pictures": (), "spans": (Span(0.0, 1.0, 1, 1),)}
    timeline = Timeline("a.avi", ("@run", "walk"), 1.0, 1.0, 1.0, scores, scores, **facts)
    write_timeline(tmp_path, timeline)
    header, row = csv.reader((tmp_path / "timeline.csv").read_text().splitlines())
    assert header[3:] == ["'@run", "walk"] and row == ["0.000", "1.000", "'@run", "0.900000", "0.100000"]


def test_the_verb_prints_segments_and_writes_windows_and_picture(folder, day, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("no video")
    output = tmp_path / "out"
    flags = {
        "paths": [str(day), str(tmp_path / "bad.mp4")], "model": str(folder), "window": "2s",
        "stride": "500ms", "output": str(output), "device": "cpu",
    }  # fmt: skip
    with pytest.raises(Exception, match="1 of 2 videos"):
        commands.predict(
            load(PredictSettings, flags={**flags, "json_lines": True}, environ={}), Console("quiet")
        )
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["seconds"] == pytest.approx(10) and first["segments"][0].keys() == {
        "start", "end", "label", "score",
    }  # fmt: skip
    assert "not a video" in second["error"]
    rows = list(csv.DictReader((output / "day" / "timeline.csv").read_text().splitlines()))
    assert len(rows) == 17 and list(rows[0]) == ["start", "end", "label", *LABELS]
    assert sum(float(rows[3][label]) for label in LABELS) == pytest.approx(1, abs=1e-5)
    assert max(LABELS, key=lambda label: float(rows[3][label])) == rows[3]["label"]
    assert (output / "day" / "timeline.png").stat().st_size > 1000
    with pytest.raises(Exception, match="1 of 2 videos"):
        commands.predict(load(PredictSettings, flags={**flags, "csv": True}, environ={}), Console("quiet"))
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert float(table[0]["end"]) == pytest.approx(first["segments"][0]["end"], abs=1e-3)
    assert table[-1]["error"]


def test_subtitles_have_valid_times_and_no_markup_of_labels(tmp_path):
    found = [Segment(0, 3599.9996, "a <b>&{\\an8}\n-->x", 0.5), Segment(3600, 3723.004, "Run", 0.876)]
    assert subtitles(found, ".srt").splitlines() == [
        "1", "00:00:00,000 --> 01:00:00,000", "a \uff1cb\uff1e&\uff5b\\an8\uff5d --\uff1ex 0.50", "",
        "2", "01:00:00,000 --> 01:02:03,004", "Run 0.88",
    ]  # fmt: skip
    first, *lines = subtitles(found, ".vtt").splitlines()
    assert first == "WEBVTT" and lines[1:4] == [
        "1", "00:00:00.000 --> 01:00:00.000", "a &lt;b&gt;&amp;{\\an8} --&gt;x 0.50",
    ]  # fmt: skip
    for suffix in SUBTITLES:  # as FFmpeg reads them
        (tmp_path / f"a{suffix}").write_text(subtitles(found, suffix), encoding="utf-8")
        with av.open(str(tmp_path / f"a{suffix}")) as container:
            times = [float(p.pts * p.time_base) for p in container.demux(subtitles=0) if p.size]
        assert times == [0, 3600]


def test_output_of_one_video_may_be_a_subtitle_file(folder, day, tmp_path):
    def written(output, *paths):
        flags = {"paths": list(map(str, paths)), "model": str(folder), "window": "2s", "device": "cpu"}
        predict_timelines(load(PredictSettings, flags={**flags, "output": str(output)}, environ={}).settings)
        return sorted(path.name for path in tmp_path.rglob("*.*") if path.is_file())

    assert written(tmp_path / "day.VTT", day) == ["day.VTT"]
    assert (tmp_path / "day.VTT").read_text().startswith("WEBVTT\n\n1\n00:00:00.000 --> ")
    said = r"day\.srt: takes one video, 2 are named\. Name a folder: .*day/timel"
    with pytest.raises(DataError, match=said):
        written(tmp_path / "day.srt", day, day)
    made = [f"timeline.{suffix}" for suffix in ("csv", "png", "srt", "vtt")]
    assert written(tmp_path / "out", day) == ["day.VTT", *made]


def test_windows_stride_and_smoothing_are_as_asked_for(folder, day, monkeypatch):
    given = []
    really = timeline_module.make_timeline

    def spy(*video, **options):
        given.append(options)
        return really(*video, **options)

    monkeypatch.setattr(timeline_module, "make_timeline", spy)

    def windows(**flags):
        own = {"paths": [str(day)], "model": str(folder), "window": "2s", "device": "cpu", **flags}
        (result,) = predict_timelines(load(PredictSettings, flags=own, environ={}).settings, silent)
        assert result.timeline is not None
        return len(result.timeline.scores)

    assert windows() == 17  # ten seconds, a window each quarter of one
    assert windows(stride="1s", smoothing="0") == 9
    assert [options["stride"] for options in given] == [0.5, 1.0]
    assert given[0]["smoothing"] != 0 and given[1]["smoothing"] == 0


CUT_RATE = 12
Picture = NDArray[np.uint8]


def texture(seed, size=32):
    """A soft texture, wider than the picture that looks at it."""
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12, 3))
    return np.kron(coarse, np.ones((size // 4, size // 4, 1))).astype(np.uint8)


def cuts_of(picture_at, frames, every=3):
    """The detector after every third frame."""

    def played():
        for number in range(frames):
            yield TimedFrame(
                number / CUT_RATE, (number + 1) / CUT_RATE, None, lambda number=number: picture_at(number)
            )

    cuts = ShotBoundaries()
    for number, frame in enumerate(cuts.watch(played())):
        if number % every == every // 2:
            assert np.array_equal(frame.picture(), picture_at(number))
    return cuts


def pan(number, seed=0, speed=1):
    left = speed * number % 48
    return texture(seed)[:32, left : left + 32]


@pytest.mark.parametrize("size", [32, 256])
def test_a_cut_is_found_midway_between_the_pictures_that_differ(size):
    first, second = texture(1, size), texture(2, size)
    cuts = cuts_of(lambda n: (first if n < 24 else second)[n % 24 : size + n % 24, :size], 48)
    assert cuts.finish() == pytest.approx([24 / CUT_RATE])
    assert cuts.decided == pytest.approx(46.5 / CUT_RATE - 3 / CUT_RATE / 2 - 1 / CUT_RATE / 2, abs=0.2)


def test_moving_flashing_and_repeated_pictures_are_no_cuts():
    noise = np.random.default_rng(0).integers(-3, 4, (48, 32, 32, 3))
    still = texture(3)[:32, :32].clip(3, 252)
    assert cuts_of(pan, 48).finish() == []
    assert cuts_of(lambda n: (still + noise[n]).astype(np.uint8), 48).finish() == []
    white = np.full((32, 32, 3), 255, np.uint8)
    assert cuts_of(lambda n: white if 24 <= n < 27 else still, 48).finish() == []
    # every second one that is taken is the last one again
    assert cuts_of(lambda n: pan(n // 6 * 6), 48).finish() == []
    assert cuts_of(pan, 1).finish() == [] and cuts_of(pan, 48, every=99).finish() == []


HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model", LABELS)


@pytest.fixture(scope="module")
def pieces():
    """Ten seconds of MPEG-TS, the bytes of a frame each."""
    out, found = io.BytesIO(), [0]
    with av.open(out, "w", format="mpegts", container_options={"flush_packets": "1"}) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(10 * RATE):
            picture = np.full((32, 48, 3), 60 + number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            found.append(out.tell())
        container.mux(stream.encode(None))
    return [out.getvalue()[a:b] for a, b in zip(found, [*found[1:], None], strict=True)]


def asked(untrained, name, **changes):
    flags = {"paths": [str(name)], "model": str(untrained), "window": "1s", "device": "cpu", **changes}
    return load(PredictSettings, flags=flags, environ={})


def watch(loaded, seen=lambda window: None):
    """The windows of a source, the notes, and the result or the error at the end; `seen` gets each window."""
    windows, notes = [], []

    def report(event):
        if isinstance(event, WindowPrediction):
            windows.append(event)
            seen(event)
        elif isinstance(event, Note):
            notes.append(event.text)

    source = find_stream(loaded.settings)
    assert source is not None
    try:
        return windows, notes, predict_stream(loaded.settings, source, report)
    except RunError as error:
        return windows, notes, error


class Sent:
    """Answers to requests: each of `parts` in turn, and then the last; `goes_on` is waited for at the end."""

    def __init__(self, *parts, goes_on=None):
        self.parts, self.goes_on, self.has_waited_in_vain = list(parts), goes_on, False

    def __iter__(self):
        yield HTTP + b"".join(self.parts.pop(0) if len(self.parts) > 1 else self.parts[0])
        if self.goes_on is not None and not self.goes_on.wait(30):
            self.has_waited_in_vain = True


def test_a_stream_has_the_windows_and_scores_of_a_timeline():
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (35, 40, 56, 3)).astype(np.uint8)
    frames[10:20] //= 4
    model = model_of(Brightness())
    expected = model.timeline(frames, fps=RATE, window=1.0, stride=0.3, batch_size=1)
    pairs = ((frame, n / RATE) for n, frame in enumerate(frames))
    found = list(model.stream(pairs, window=1.0, stride=0.3, batch_size=1))
    assert [w.start for w in found] == pytest.approx(expected.starts())
    assert len(found) == 9 and np.array_equal([w.scores for w in found], expected.scores)
    assert [w.label for w in found] == [LABELS[row.argmax()] for row in expected.scores]
    assert found[0].score == found[0].scores.max() and found[0].end == 1.0 and found[0].time.tzinfo


GREY = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(GREY[..., 0], 0)], r"frame 0: uint8 \(8, 8\)\. Give RGB"),
        ([(GREY / 255, 0)], r"frame 0: float64 \(8, 8, 3\)"),
        ([(GREY, 0), (GREY, 1.5), (GREY, 1.5)], r"frame 2: 1\.5 s is not after 1\.5 s"),
        ([(GREY, -1)], "not a time from 0 on"),
        ([(GREY, float("nan"))], "not a time"),
    ],
)
def test_frames_of_a_stream_and_their_times_are_checked(pairs, message):
    with pytest.raises(DataError, match=message):
        list(model_of(Brightness()).stream(pairs))
    with pytest.raises(SettingsError, match="window"):
        model_of(Brightness()).stream(pairs, window=0)


@pytest.mark.parametrize("is_live", [True, False])
def test_windows_that_the_model_cannot_follow_are_dropped_if_live(is_live, monkeypatch):
    monkeypatch.setattr(stream, "MOST", 8)
    all_made = threading.Event()

    class Slow(Brightness):
        def forward(self, clips):
            assert not is_live or all_made.wait(30)
            return super().forward(clips)

    def frames():
        yield from ((GREY, n / RATE) for n in range(60 * RATE))
        all_made.set()

    found = list(model_of(Slow()).stream(frames(), window=1.0, stride=1.0, live=is_live))
    dropped = sum(w.dropped for w in found)
    assert len(found) + dropped == 60 and found[-1].end == 60
    assert (dropped >= 60 - 8 - 8) if is_live else (dropped == 0)


def test_ten_minutes_of_a_stream_take_bounded_memory(untrained):
    from tvit_cli import load_model

    model, taken, ahead = load_model(untrained, device="cpu"), [0.0], 0.0

    def frames():
        for n in range(600 * RATE):
            taken[0] = n / RATE
            yield np.full((32, 48, 3), n % 256, np.uint8), taken[0]

    count = 0
    for window in model.stream(frames(), window=2.0, stride=2.0, batch_size=4):
        count, ahead = count + 1, max(ahead, taken[0] - window.start)
    assert (
        count == 300 and ahead <= 10 * 2.0 + 0.5
    )  # at most 4 windows in a batch, 4 that wait, one that is open


def test_first_answer_comes_within_two_windows_and_a_second(untrained, pieces):
    answered = threading.Event()
    sent = Sent(pieces[: 3 * RATE], goes_on=answered)  # windows of a second

    def stop(window):
        answered.set()
        raise KeyboardInterrupt

    with serving() as server:
        windows, _, error = watch(asked(untrained, server.add("/camera", b"", raw=sent)), stop)
    assert len(windows) == 1 and not sent.has_waited_in_vain
    assert isinstance(error, Interrupted) and error.exit_code == 130


def test_a_stream_that_is_cut_is_resumed_and_then_given_up(untrained, pieces, monkeypatch, tmp_path):
    monkeypatch.setattr(live, "DELAYS", (0, 0))
    parts = [pieces[:22]] * 3  # the first is for a look at the stream
    with rtsp_serving(parts) as url:
        windows, notes, error = watch(asked(untrained, url, output=str(tmp_path)))
    first, second = windows[:5], windows[5:]
    assert [w.start for w in first] == [0, 0.25, 0.5, 0.75, 1]
    assert len(second) == 5 and second[0].start >= first[-1].end  # none lies over the cut
    name = url.replace("user:secret@", "")
    assert any(re.match(re.escape(name) + r": cut after 2\.\d s; attempt 1 of 2", note) for note in notes)
    assert error.exit_code == 1 and f"{name}: cut after" in str(error) and "10 windows in" in str(error)
    assert "2 attempts to open it again failed. The last: cannot be opened" in str(error)
    assert "2 cuts." in str(error)
    rows = list(csv.DictReader((tmp_path / "live" / "timeline.csv").read_text().splitlines()))
    assert len(rows) == 10 and list(rows[0]) == ["start", "end", "label", *LABELS, "time"]
    assert rows[9]["label"] == windows[9].label and rows[9]["time"] == windows[9].time.isoformat()


def test_a_growing_file_is_followed_until_it_grows_no_more(untrained, pieces, monkeypatch, tmp_path):
    monkeypatch.setattr(live, "GROWTH_SECONDS", 1.0)
    path = tmp_path / "recording.ts"
    path.write_bytes(b"".join(pieces[:30]))
    rest = [pieces[30:60], pieces[60:]]

    def grow(window):
        if rest:
            with path.open("ab") as file:
                file.write(b"".join(rest.pop(0)))

    windows, _, result = watch(asked(untrained, path, stride="1s", follow=True), grow)
    assert [w.end for w in windows] == pytest.approx(range(1, 11)) and result.windows == 10
    assert (
        find_stream(asked(untrained, path).settings) is None
    )  # without --follow, it is a video as any other


@pytest.fixture
def send(monkeypatch):
    """`send(data)` puts bytes into a pipe that is stdin."""
    end, begin = os.pipe()

    def write(data):
        with os.fdopen(begin, "wb") as file:
            file.write(data)

    with os.fdopen(end) as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield write


@pytest.mark.parametrize("form", ["json_lines", "csv", "table"])
def test_bytes_on_stdin_give_a_line_per_window(untrained, pieces, send, capsys, form):
    send(b"".join(pieces[:35]))
    changes = {} if form == "table" else {form: True}
    commands.predict(asked(untrained, "-", stride="500ms", **changes), Console("normal"))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "-: 6 windows in 3.5 s." in captured.err
    if form == "json_lines":
        first = json.loads(lines[0])
        assert first.keys() == {"video", "time", "start", "end", "label", "score", "dropped"}
        assert [json.loads(line)["end"] for line in lines] == pytest.approx([1, 1.5, 2, 2.5, 3, 3.5])
        return
    rows = [re.split(",", line) if form == "csv" else re.split("  +", line.strip()) for line in lines]
    assert len(rows) == 7 and rows[0] == ["time", "start", "end", "label", "score"]
    assert rows[1][1:3] == ["0.00", "1.00"] and rows[6][2] == "3.50" and rows[1][3] in LABELS


def silence():
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "changes", "message"),
    [
        ("0", b"", {}, r"^0: camera .+ cannot be opened \(.+\)\. (No camera is found|Cameras here: )"),
        ("0", b"", {"window": None}, r"^0: is read as it comes, .+ Add --window"),
        ("-", b"\x00" * 9, {}, r"^-: not a video that FFmpeg can read .+ Send MPEG-TS, Matroska"),
        ("-", silence(), {}, r"^-: no video in this file, only audio\.$"),
        ("rtsp://127.0.0.1:9/x", b"", {}, r"^rtsp://127.0.0.1:9/x: cannot be opened \(.+refused\)\. Check"),
        ("none.ts", b"", {"follow": True}, r"^none\.ts: no such file to follow"),
        ("udp://127.0.0.1:9", b"", {"paths": ["udp://127.0.0.1:9", "a.avi"]}, "2 videos are named. Name one"),
        ("-", b"\x00", {"smoothing": "1"}, "^--smoothing applies to files"),
    ],
)
def test_a_live_source_that_cannot_be_read_is_one_sentence(untrained, send, name, data, changes, message):
    send(data)
    with pytest.raises(TvitError, match=message) as raised:
        commands.predict(asked(untrained, name, **changes), Console("quiet"))
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Interrupted("", exit_code=143), 143)])
def test_a_stopped_stream_keeps_its_windows(untrained, pieces, send, tmp_path, stop, code):
    send(b"".join(pieces))

    def third(window):
        if window.end == 3:
            raise stop

    windows, _, error = watch(asked(untrained, "-", stride="1s", output=str(tmp_path)), third)
    assert isinstance(error, Interrupted) and error.exit_code == code and "3 windows in 3.0 s" in str(error)
    assert len((tmp_path / "stdin" / "timeline.csv").read_text().splitlines()) == 1 + len(windows) == 4
    cues = (tmp_path / "stdin" / "timeline.srt").read_text().split("\n\n")
    assert (
        cues[0].startswith("1\n00:00:00,000 --> ") and f"--> 00:00:03,000\n{windows[-1].label} " in cues[-1]
    )


def test_subtitles_of_a_stream_follow_its_labels(tmp_path):
    files = StreamFiles(tmp_path, ("a", "b"), lambda event: None)
    now = datetime.now().astimezone()
    for start, label in ((0, "a"), (1, "a"), (2, "b"), (9, "b")):  # a gap after the third
        files.add(WindowPrediction(start, start + 2, now, label, 0.5, np.array([0.5, 0.5]), 0))
    files.close()
    whole = [Segment(0, 2, "a", 0.5), Segment(2, 4, "b", 0.5), Segment(9, 11, "b", 0.5)]
    for suffix in (".srt", ".vtt"):
        assert (tmp_path / f"timeline{suffix}").read_text() == subtitles(whole, suffix)


def test_a_full_disk_costs_the_table_of_a_stream_and_no_answer(
    untrained, pieces, send, monkeypatch, tmp_path
):
    really = Path.open

    def full(path, mode="r", **how):
        if path.name == "timeline.csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(path, mode, **how)

    send(b"".join(pieces[:35]))
    monkeypatch.setattr(Path, "open", full)
    windows, notes, result = watch(asked(untrained, "-", output=str(tmp_path)))
    assert len(windows) == result.windows == 11 and notes.count(result.unwritten[0]) == 1
    assert "timeline.csv: cannot be written (No space left on device). Free some" in result.unwritten[0]


def test_a_stream_shorter_than_a_window_says_so(untrained, pieces, send):
    send(b"".join(pieces[:20]))
    assert watch(asked(untrained, "-", window="4s"))[1][-1] == "-: no window of 4 s was complete."


def test_a_camera_without_times_gets_those_of_the_clock():
    noise = np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8)
    out = io.BytesIO()
    with av.open(out, "w", format="mpjpeg") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for _ in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
    first = out.tell() // 8  # 5 frames, more than FFmpeg reads to find the format
    pages = [out.getvalue()[:first], out.getvalue()[first:]]
    with serving() as server:
        url = server.add("/mjpg", b"", raw=[HTTP, *pages], seconds_per_chunk=0.4)
        source = find_live(url)
        assert source is not None and source.is_live()
        steps = {round(f.start - n / 25, 2) for n, f in zip(range(40), source.frames(), strict=False)}
        assert len(steps) > 1  # FFmpeg takes 25 frames per second for granted
        assert find_live(server.add("/clip.mp4", b"")) is None


def test_the_opencv_loop_prints_windows_and_names_a_missing_opencv(untrained, monkeypatch, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "use_opencv.py"))
    example["frames"].__globals__["time"] = SimpleNamespace(monotonic=iter(range(9)).__next__)
    pictures = iter([(True, GREY)] * 7 + [(False, None)])
    capture = SimpleNamespace(isOpened=lambda: True, read=lambda: next(pictures))
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=lambda source: capture))
    example["main"](str(untrained), "0")
    assert re.fullmatch(r"(\d\d:\d\d:\d\d  \w+  0\.\d{3}\n){11}", capsys.readouterr().out)  # 7 s
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SystemExit, match=r"not installed\. Run: python -m pip install"):
        example["main"](str(untrained))
