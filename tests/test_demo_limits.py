"""Limits of a request to the demo: frames, seconds, and a client that leaves."""

import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from needs import need

from tvit_cli.engine.predict import load_model
from tvit_cli.results import Segment


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "model", tuple(tiny.COLOURS))


@pytest.fixture(scope="module")
def demo():
    """The module of examples/gradio_demo.py."""
    need("gradio")
    path = Path(__file__).parents[1] / "examples" / "gradio_demo.py"
    spec = importlib.util.spec_from_file_location("gradio_demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Endless:
    """A model whose timelines never end by themselves."""

    def __init__(self) -> None:
        self.began, self.ended = threading.Event(), threading.Event()

    def timeline(self, path: Path, *, progress: Callable[..., None], **how: Any) -> None:
        self.began.set()
        try:
            while True:
                progress(1.0, None)
        finally:
            self.ended.set()


@pytest.mark.parametrize("step", ["when", "write"])
def test_a_timeline_of_the_demo_ends_when_its_client_leaves(step, demo, make_video, tmp_path):
    model = Endless()
    page = demo.Page(model, tmp_path)
    request = getattr(page, step)(str(make_video(tmp_path / "a.mp4")), 2.0, 0.5)
    next(request)
    assert model.began.wait(60) and not model.ended.is_set()
    request.close()  # by Gradio, for a client that has left
    assert model.ended.wait(60)


@pytest.mark.parametrize("step", ["when", "write"])
def test_a_timeline_of_the_demo_ends_when_its_time_is_up(step, demo, make_video, tmp_path):
    model = Endless()
    page = demo.Page(model, tmp_path, max_seconds=0.1)
    with pytest.raises(demo.gr.Error, match=r"Stopped after 0\.1 s, the limit of one request"):
        list(getattr(page, step)(str(make_video(tmp_path / "a.mp4")), 2.0, 0.5))
    assert model.ended.is_set()


def test_a_video_of_too_many_frames_is_refused_by_each_step_of_the_demo(demo, model, make_video, tmp_path):
    page = demo.Page(load_model(model, device="cpu"), tmp_path, max_frames=11)
    video = str(make_video(tmp_path / "a.mp4", frames=12))
    for step in (
        lambda: page.label(video, 3),
        lambda: page.explain(video, demo.BEST_LABEL),
        lambda: list(page.when(video, 2.0, 0.5)),
        lambda: list(page.write(video, 2.0, 0.5)),
    ):
        with pytest.raises(
            demo.gr.Error, match=r"a\.mp4: has 12 frames; this page takes videos of at most 11"
        ):
            step()


def test_the_demo_gives_the_timeline_that_the_model_makes(demo, model, make_video, tmp_path):
    page = demo.Page(load_model(model, device="cpu"), tmp_path)
    video = make_video(tmp_path / "a.mp4", frames=40, rate=10)
    *_, shown = page.when(str(video), 2.0, 0.5)
    timeline = page.model.timeline(video, window=2.0, stride=0.5)
    assert demo.table(timeline) in shown[0]


def test_the_demo_plays_nothing_that_is_no_video(demo, tmp_path):
    letter = tmp_path / "letter.mp4"
    letter.write_text("Dear reader")
    page = demo.Page(None, tmp_path)
    for nothing in (None, str(letter)):
        assert [update["visible"] for update in page.play(nothing)] == [False]


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ("aaab", "Mostly a, 0:03 of 0:04. Also b 0:01"),
        ("abcb", "Mostly b, 0:02 of 0:04. Also a 0:01, c 0:01"),
        ("abcde", "5 actions, so no label fits all 0:05: a 0:01, b 0:01, c 0:01, d 0:01, e 0:01"),
        ("aaa", ""),
    ],
)
def test_the_demo_calls_one_of_many_actions_mostly(demo, segments, text):
    timeline = SimpleNamespace(segments=[Segment(n, n + 1, label, 0.9) for n, label in enumerate(segments)])
    assert demo.summary(timeline) == (demo.card(text) if text else "")
