"""The demo: its page in a browser, and the limits of a request."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from needs import need
from tiny import make_model

import tvit_cli
from tvit_cli.data.motions import CLASSES
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.predict import load_model
from tvit_cli.results import Segment

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (  # root has no sandbox; what a browser asks its maker for at a start is no business of this test
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
PATIENCE = 120_000  # milliseconds


@dataclass
class Demo:
    """The process, where it listens, and where its temporary files are."""

    process: subprocess.Popen[str]
    url: str
    model: tvit_cli.Model
    temporary: Path


@dataclass
class Watched:
    """A page, with what went wrong in it and which hosts it asked."""

    page: Any  # playwright.sync_api.Page, which may not be installed
    problems: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)


def start(*arguments, temporary):
    temporary.mkdir(parents=True)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "gradio_demo.py"), *arguments], cwd=temporary.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    need("gradio", "playwright")
    need(program=CHROMIUM, name="chromium")
    root = tmp_path_factory.mktemp("demo")
    model = make_model(root / "model", CLASSES)
    process = start("--model", str(model), "--max-upload-mb", "1", temporary=root / "temporary")
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert " at http://127.0.0.1:" in said, said + process.communicate(timeout=60)[0]
        url = said.split(" at ")[1].split()[0]
        yield Demo(process, url, tvit_cli.load_model(model, device="cpu"), root / "temporary")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser(demo):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def watched(demo, browser):
    """The demo's page, in the dark."""
    page = browser.new_page(color_scheme="dark")
    page.set_default_timeout(PATIENCE)
    found = Watched(page)
    page.on("pageerror", lambda error: found.problems.append(str(error)))
    page.on("console", lambda m: found.problems.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: found.hosts.add(r.url.split("/")[2] if "://" in r.url else ""))
    page.goto(demo.url)
    yield found
    page.close()


def upload(page, path):
    page.locator("#video input[type=file]").set_input_files(path)


def test_a_video_is_uploaded_labelled_explained_and_told_in_time(demo, watched, tmp_path):
    page = watched.page
    path = tmp_path / "two things.avi"
    frames = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3)).astype(np.uint8)
    frames[30:, :, :16] = 255
    write_video(path, frames, rate=10)  # AVI, which browsers do not play

    upload(page, path)
    page.get_by_text("two things").first.wait_for()
    page.wait_for_function("document.querySelector('#player video')?.videoWidth == 32")  # a copy as MP4
    page.locator("#go").click()
    prediction = demo.model.predict(path, top_k=5)
    page.locator("#scores").get_by_text(prediction.label).first.wait_for()
    shown = page.locator("#scores").inner_text()
    assert all(label in shown for label, _ in prediction.labels)
    assert f"{prediction.labels[0][1]:.0%}" in shown

    lit = page.locator("#why img.on-dark")
    lit.wait_for()
    assert lit.evaluate("image => image.naturalWidth") >= 2 * 4 * 112
    assert not page.locator("#why img.on-light").is_visible()
    assert "without random ones" in lit.get_attribute("alt")
    assert page.locator("#frames img").count() == demo.model.card.preprocessing.n_frames

    page.get_by_role("tab", name="When").click()
    page.locator("#timeline td").first.wait_for()
    timeline = demo.model.timeline(path, window=2.0, stride=0.5)
    cells = page.locator("#timeline td").all_inner_texts()
    assert cells[2::4] == [segment.label for segment in timeline.segments]
    assert cells[-3] == "0:06"
    assert page.locator("#timeline img.on-dark").evaluate("image => image.naturalWidth") == 2000

    page.get_by_role("tab", name="Video").click()
    page.locator("#write").click()
    video = page.locator("#labelled video")
    video.wait_for()
    page.wait_for_function("document.querySelector('#labelled video').videoWidth == 32")

    assert watched.problems == []
    assert watched.hosts <= {demo.url.split("/")[2], ""}


def test_an_example_is_labelled_when_it_is_picked(watched):
    page = watched.page
    page.get_by_role("button", name="four-in-a-row").click()
    page.get_by_role("tab", name="When").click()
    page.locator("#timeline td").first.wait_for()
    assert "0:32" in page.locator("#timeline td").all_inner_texts()
    assert page.evaluate("document.querySelector('#player video').currentSrc").endswith("four-in-a-row.mp4")
    assert watched.problems == []


def test_what_is_no_video_is_a_sentence_in_the_page(watched, tmp_path):
    page = watched.page
    page.locator("#go").click()
    page.get_by_text("Upload a video first").wait_for()
    path = tmp_path / "letter.mp4"
    path.write_text("Dear reader")
    upload(page, path)
    page.get_by_text("letter").first.wait_for()
    page.locator("#go").click()
    page.get_by_text("letter.mp4: not a video that FFmpeg can read").wait_for()
    assert "Traceback" not in page.content() and str(path.parent) not in page.content()


def test_a_video_that_is_too_large_is_refused(watched, tmp_path):
    path = tmp_path / "large.mp4"
    path.write_bytes(bytes(2 << 20))
    upload(watched.page, path)
    watched.page.get_by_text("exceed the maximum allowed size").first.wait_for()


def test_nothing_is_left_on_the_disk_when_it_ends(demo):
    assert any(demo.temporary.iterdir())
    demo.process.terminate()
    said = demo.process.communicate(timeout=60)[0]
    assert demo.process.returncode == 0, said
    assert "Traceback" not in said
    assert list(demo.temporary.iterdir()) == []


def test_without_a_model_it_says_how_to_get_one(tmp_path):
    need("gradio")
    said = start(temporary=tmp_path / "temporary").communicate(timeout=120)[0]
    assert said.startswith("error: working_directory: no trained model in it.") and "quickstart" in said


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "model", tuple(tiny.COLOURS))


@pytest.fixture(scope="module")
def gradio_page():
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
def test_a_timeline_of_the_demo_ends_when_its_client_leaves(step, gradio_page, make_video, tmp_path):
    untrained = Endless()
    page = gradio_page.Page(untrained, tmp_path)
    request = getattr(page, step)(str(make_video(tmp_path / "a.mp4")), 2.0, 0.5)
    next(request)
    assert untrained.began.wait(60) and not untrained.ended.is_set()
    request.close()  # by Gradio, for a client that has left
    assert untrained.ended.wait(60)


@pytest.mark.parametrize("step", ["when", "write"])
def test_a_timeline_of_the_demo_ends_when_its_time_is_up(step, gradio_page, make_video, tmp_path):
    untrained = Endless()
    page = gradio_page.Page(untrained, tmp_path, max_seconds=0.1)
    with pytest.raises(gradio_page.gr.Error, match=r"Stopped after 0\.1 s, the limit of one request"):
        list(getattr(page, step)(str(make_video(tmp_path / "a.mp4")), 2.0, 0.5))
    assert untrained.ended.is_set()


def test_a_video_of_too_many_frames_is_refused_by_each_step_of_the_demo(
    gradio_page, untrained, make_video, tmp_path
):
    page = gradio_page.Page(load_model(untrained, device="cpu"), tmp_path, max_frames=11)
    video = str(make_video(tmp_path / "a.mp4", frames=12))
    for step in (
        lambda: page.label(video, 3),
        lambda: page.explain(video, gradio_page.BEST_LABEL),
        lambda: list(page.when(video, 2.0, 0.5)),
        lambda: list(page.write(video, 2.0, 0.5)),
    ):
        said = r"a\.mp4: has 12 frames; this page takes videos of at most 11"
        with pytest.raises(gradio_page.gr.Error, match=said):
            step()


def test_the_demo_gives_the_timeline_that_the_model_makes(gradio_page, untrained, make_video, tmp_path):
    page = gradio_page.Page(load_model(untrained, device="cpu"), tmp_path)
    video = make_video(tmp_path / "a.mp4", frames=40, rate=10)
    *_, shown = page.when(str(video), 2.0, 0.5)
    timeline = page.model.timeline(video, window=2.0, stride=0.5)
    assert gradio_page.table(timeline) in shown[0]


def test_the_demo_plays_nothing_that_is_no_video(gradio_page, tmp_path):
    letter = tmp_path / "letter.mp4"
    letter.write_text("Dear reader")
    page = gradio_page.Page(None, tmp_path)
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
def test_the_demo_calls_one_of_many_actions_mostly(gradio_page, segments, text):
    timeline = SimpleNamespace(segments=[Segment(n, n + 1, label, 0.9) for n, label in enumerate(segments)])
    assert gradio_page.summary(timeline) == (gradio_page.card(text) if text else "")
