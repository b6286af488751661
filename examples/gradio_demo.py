"""A page to try a trained model in: its label for a video, where it saw it, and what happens when.

    python -m pip install "tvit[demo]"
    python examples/gradio_demo.py [--model FOLDER] [--host 127.0.0.1] [--port 7860] [--share]

Without --model it is the newest one below working_directory/. Nothing leaves the machine unless --share asks for
it; what people upload is deleted an hour after, and all of it when the demo ends. A request is limited in frames
and in time, and a timeline that nobody waits for any more is given up.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import tvit_cli
from tvit_cli.data.layout import VIDEO_SUFFIXES
from tvit_cli.data.motions import CLASSES, RATE, make_motions
from tvit_cli.data.video import count_packets, read_clip
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.predict.explain import Explanation, verdict
from tvit_cli.engine.predict.timeline import annotate
from tvit_cli.errors import RunError, TvitError, VideoError
from tvit_cli.model.folder import find_newest_model
from tvit_cli.report.drawing import PALETTE
from tvit_cli.report.film import clock, jpeg_uri, timeline_png, to_pixels
from tvit_cli.results import Timeline

# Gradio reads these when it is imported.
TEMPORARY = tempfile.TemporaryDirectory(prefix="tvit-demo-", ignore_cleanup_errors=True)
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": f"{TEMPORARY.name}/gradio"}
try:
    import gradio as gr
except ImportError:
    sys.exit('The demo needs Gradio: python -m pip install "tvit[demo]"')

T = TypeVar("T")
Alive = Callable[..., None]  # called with the seconds done and, where it is known, those there are

THE_BEST = "the best one"
IN_A_ROW = ("MoveRight", "Grow", "TurnClockwise", "MoveUp")  # of the example of a long video
NO_WHY = "Here it will stand where in its frames the label is seen."
NO_TIMELINE = "Here it will stand what happens when."
HOUR = 3600  # seconds
POLL = 0.5  # seconds between two looks at whether a client still waits
MOST_FRAMES, MOST_SECONDS = 30_000, 300
MODEL = "model"  # what it is asked in the page, it answers one at a time
CSS = """
.gradio-container {max-width: 1120px !important; margin: 0 auto}
#head h1 {margin: .6rem 0 0; font-size: 1.75rem; letter-spacing: -.02em}
.dim {margin: 0; color: var(--body-text-color-subdued)}
.card {padding: 14px 16px; border: 1px solid var(--border-color-primary); border-radius: var(--block-radius);
  background: var(--block-background-fill)}
.drawn {width: 100%}
.dark .on-light, body:not(.dark) .on-dark {display: none}
.frames {display: grid; grid-template-columns: repeat(auto-fit, minmax(64px, 1fr)); gap: 6px; margin-top: 10px}
.frames img {width: 100%; max-width: 224px; border-radius: 6px}
.html-container {padding: 0 !important}
.card table {width: 100%; margin-top: 10px; border-collapse: collapse; font-variant-numeric: tabular-nums}
.card table :is(th, td) {padding: 5px 10px; text-align: left; border: none !important;
  border-bottom: 1px solid var(--border-color-primary) !important}
footer {display: none !important}
"""


class Page:
    """Answers of the page; `folder` is for what it writes.

    A video has at most `most_frames`, and a timeline takes at most `most_seconds` to make.
    """

    def __init__(
        self,
        model: tvit_cli.Model,
        folder: Path,
        most_frames: int = MOST_FRAMES,
        most_seconds: float = MOST_SECONDS,
    ) -> None:
        self.model = model
        self.folder = folder
        self.most_frames = most_frames
        self.most_seconds = most_seconds

    def label(self, video: str | None, top_k: int) -> dict[str, float]:
        """The best labels with their scores."""
        with told(path := chosen(video)):
            self.check(path)
            return dict(self.model.predict(path, top_k=int(top_k)).labels)

    def explain(self, video: str | None, label: str) -> tuple[str, str]:
        """The frames that the model was given, and what speaks for a label in them."""
        with told(path := chosen(video)):
            self.check(path)
            why = self.model.explain(path, label=None if label == THE_BEST else label)
        pictures = [self.model.draw_explanation(why, dark=dark) for dark in (False, True)]
        text = f"What speaks for {why.label}: {verdict(why.deletion)}"
        note = "Lit patches speak for the label. Below them stand each frame's share, and a test of the map."
        return self.frames(why), card(note, drawn(pictures, text))

    def when(
        self,
        video: str | None,
        window: float,
        stride: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio finds out that it is wanted)
    ) -> Iterator[Any]:
        """The timeline as a picture, and its segments as a table."""

        def played(done: float, total: float | None) -> None:
            progress(min(1.0, done / total) if total else None, f"{clock(done)} played")

        with told(path := chosen(video)):
            timeline = yield from waited(
                lambda alive: self.timeline(path, window, stride, alive), self.most_seconds, played
            )
        yield drawn_timeline(timeline, window)

    def write(self, video: str | None, window: float, stride: float) -> Iterator[Any]:
        """The video with its labels in the picture, as a file that browsers play; Gradio takes a copy."""
        with told(path := chosen(video)), tempfile.TemporaryDirectory(dir=self.folder) as folder:
            place = Path(folder) / f"{path.stem}-labelled.mp4"

            def work(alive: Alive) -> None:
                timeline = self.timeline(path, window, stride, alive)
                annotate(place, path, timeline.segments, lambda event: alive())

            yield from waited(work, self.most_seconds)
            yield str(place)

    def timeline(self, path: Path, window: float, stride: float, alive: Alive) -> Timeline:
        """The timeline of a video that the page takes."""
        self.check(path)
        return self.model.timeline(path, window=window, stride=min(stride, window), progress=alive)

    def check(self, path: Path) -> None:
        """Raises VideoError for a video of more frames than the page takes."""
        if (frames := count_packets(path)) > self.most_frames:
            raise VideoError(
                f"{path}: has {frames:,} frames; this page takes videos of at most {self.most_frames:,}. "
                "Upload a shorter part of it."
            )

    def frames(self, why: Explanation) -> str:
        """The frames that the model was given."""
        pixels = to_pixels(why.clip, self.model.card.preprocessing)
        pixels = pixels.permute(0, 2, 3, 1).contiguous()  # (T, S, S, C)
        tags = [f'<img alt="Frame {n}" src="{jpeg_uri(frame)}">' for n, frame in enumerate(pixels, 1)]
        return card(
            f"The {len(tags)} frames that the model saw", f'<div class="frames">{"".join(tags)}</div>'
        )

    def about(self) -> str:
        """The model in a line."""
        card = self.model.card
        facts = [
            f"{len(card.labels)} classes",
            f"{card.preprocessing.n_frames} frames of {card.preprocessing.frame_size} pixels",
            f"{card.model['attention']} attention",
        ]
        if (top1 := card.metrics.get("val_video_top1")) is not None:
            facts.append(f"top-1 of {top1:.3f} on {card.metrics.get('val_videos', 0):.0f} validation videos")
        return " · ".join(facts)


def waited(
    work: Callable[[Alive], T],
    most: float,
    progress: Callable[[float, float | None], None] | None = None,
) -> Generator[Any, None, T]:
    """Returns the result of `work`, done in a thread; yields meanwhile, so that Gradio may close this generator.

    It does so when the client has left. Then, or after `most` seconds, `alive(done, total)` raises in the thread,
    which `work` calls again and again.
    """
    left = threading.Event()
    end = time.monotonic() + most
    done: list[tuple[float, float | None]] = []
    future: Future[T] = Future()

    def alive(*now: Any) -> None:
        if left.is_set():
            raise RunError("The client has left.")
        if time.monotonic() > end:
            raise RunError(
                f"Stopped after {most:g} s, the limit of one request. Upload a shorter video, or choose more "
                "seconds between windows."
            )
        done[:] = [now] if now else []

    def run() -> None:
        try:
            future.set_result(work(alive))
        except BaseException as error:  # noqa: BLE001  # raised again by future.result()
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while wait([future], POLL).not_done:
            if progress is not None and (now := done[:]):
                progress(*now[0])
            yield gr.skip()
        return future.result()
    finally:
        left.set()


def chosen(video: str | None) -> Path:
    """The file that was uploaded or picked."""
    if video is None:
        raise gr.Error("Upload a video first, or pick an example.", print_exception=False)
    return Path(video)


@contextmanager
def told(video: Path) -> Iterator[None]:
    """An error of the engine is shown in the page, with the name that the person knows the file by."""
    try:
        yield
    except TvitError as error:
        text = escape(str(error).replace(str(video), video.name))
        raise gr.Error(text, duration=None, print_exception=False) from error


def drawn_timeline(timeline: Timeline, window: float) -> str:
    """The timeline as a picture, or why there is none."""
    if timeline.window < window:
        return card(
            f"The video lasts {timeline.seconds:.1f} s, less than a window of {window:g} s, so it is one clip. "
            "Take a longer video, or a shorter window."
        )
    text = ", ".join(f"{s.label} from {clock(s.start)} to {clock(s.end)}" for s in timeline.segments)
    note = (
        f"What each window of {timeline.window:g} s looks like (shade), and the segments that follow (bars)."
    )
    picture = drawn([timeline_png(timeline, dark=dark) for dark in (False, True)], text)
    return card(note, picture + table(timeline))


def table(timeline: Timeline) -> str:
    """The segments, a row each."""
    rows = [(clock(s.start), clock(s.end), escape(s.label), f"{s.score:.3f}") for s in timeline.segments]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr><th>start<th>end<th>label<th>score</tr>{body}</table>"


def drawn(pictures: list[bytes], text: str) -> str:
    """A PNG on light paper and one on dark, of which the page shows one; `text` says the same in words."""
    return "".join(
        f'<img class="drawn on-{name}" alt="{escape(text)}" src="data:image/png;base64,{b64encode(data).decode()}">'
        for name, data in zip(("light", "dark"), pictures, strict=True)
    )


def card(note: str, inside: str = "") -> str:
    """A box with a sentence above what it shows."""
    return f'<div class="card"><p class="dim">{escape(note)}</p>{inside}</div>'


def make_examples(folder: Path) -> list[Path]:
    """A clip of each class of the demo motions, and a video of 32 s in which four of them follow each other."""
    make_motions(folder / "motions", clips_per_group=1, frame_size=128)
    clips = {label: sorted((folder / "motions" / "test" / label).glob("*.avi")) for label in CLASSES}
    pieces = [read_clip(clip, range).frames for label in IN_A_ROW for clip in clips[label]]
    one_after_another = folder / "four-in-a-row.mp4"
    write_video(one_after_another, np.concatenate(pieces), rate=RATE)
    return [one_after_another, *(found[0] for found in clips.values())]


def build(page: Page, examples: list[Path]) -> gr.Blocks:
    """The page."""
    labels = page.model.labels
    with gr.Blocks(title="tvit", analytics_enabled=False, delete_cache=(HOUR // 6, HOUR)) as blocks:
        gr.HTML(
            f'<h1>What happens in this video?</h1><p class="dim">{escape(page.about())}</p>',
            elem_id="head",
            padding=False,
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                video = gr.File(label="Video", file_types=sorted(VIDEO_SUFFIXES), height=150, elem_id="video")
                chips = gr.Column(visible=bool(examples), min_width=300)
                go = gr.Button("Label it", variant="primary", elem_id="go")
                with gr.Accordion("Options", open=False):
                    top_k = gr.Slider(1, len(labels), min(5, len(labels)), step=1, label="Labels shown")
                    label = gr.Dropdown([THE_BEST, *labels], value=THE_BEST, label="Label to explain")
                    window = gr.Slider(0.5, 10, 2, step=0.5, label="Timeline: seconds in a window")
                    stride = gr.Slider(0.1, 5, 0.5, step=0.1, label="Timeline: seconds between windows")
            with gr.Column(scale=3, min_width=320):
                scores = gr.Label(label="Label", elem_id="scores")
                frames = gr.HTML(elem_id="frames")
        with gr.Tab("Why"):
            why = gr.HTML(card(NO_WHY), elem_id="why")
        with gr.Tab("When"):
            timeline = gr.HTML(card(NO_TIMELINE), elem_id="timeline")
        with gr.Tab("Video"):
            write = gr.Button("Write the labels into the video", elem_id="write")
            labelled = gr.Video(label="With its labels", interactive=False, height=360, elem_id="labelled")
        starts = [go.click]
        if examples:
            with chips:
                picked = gr.Examples(
                    [[str(path)] for path in examples],
                    inputs=[video],
                    label="Or one that this page made",
                    example_labels=[p.stem if p.suffix == ".mp4" else p.parent.name for p in examples],
                )
            starts.append(picked.load_input_event.success)
        for start in starts:  # each step shows what it found before the next one begins
            cleared = start(blank_page, None, [scores, frames, why, timeline, labelled], queue=False)
            labelling = cleared.success(page.label, [video, top_k], scores, concurrency_id=MODEL)
            explaining = labelling.success(page.explain, [video, label], [frames, why], concurrency_id=MODEL)
            explaining.success(page.when, [video, window, stride], timeline, concurrency_id=MODEL)
        write.click(page.write, [video, window, stride], labelled, concurrency_id=MODEL)
    return blocks


def blank_page() -> tuple[None, str, str, str, None]:
    """Nothing of an earlier video stands beside a new one, or beside an error."""
    return None, "", card(NO_WHY), card(NO_TIMELINE), None


def theme() -> gr.themes.Base:
    """Plain, in the colours of tvit's pictures, with the fonts of the reader's own system."""
    paper, ink = PALETTE["paper"], PALETTE["ink"]
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="zinc",
        radius_size="lg",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0f1115",
        body_text_color=ink[0],
        body_text_color_dark=ink[1],
        body_text_color_subdued=PALETTE["dim"][0],
        body_text_color_subdued_dark=PALETTE["dim"][1],
        block_background_fill=paper[0],
        block_background_fill_dark=paper[1],
        border_color_primary=PALETTE["grid"][0],
        border_color_primary_dark=PALETTE["grid"][1],
        button_primary_background_fill=PALETTE["one"][0],
        button_primary_background_fill_dark=PALETTE["one"][0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="model folder, or a run's; default: the newest one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 for the whole network"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers")
    parser.add_argument("--max-upload-mb", type=int, default=256, help="largest video that is taken (256)")
    parser.add_argument(
        "--max-frames", type=int, default=MOST_FRAMES, help=f"frames of the longest video ({MOST_FRAMES})"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=MOST_SECONDS, help=f"longest work on a timeline ({MOST_SECONDS})"
    )
    told = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with TEMPORARY:
        folder = Path(TEMPORARY.name)
        try:
            model = tvit_cli.load_model(told.model or find_newest_model(Path("working_directory")))
            examples = make_examples(folder) if set(CLASSES) <= set(model.labels) else []
        except TvitError as error:
            sys.exit(f"error: {error}")
        blocks = build(Page(model, folder, told.max_frames, told.max_seconds), examples)
        try:
            _, local, public = blocks.launch(
                server_name=told.host,
                server_port=told.port,
                share=told.share,
                max_file_size=f"{told.max_upload_mb}mb",
                theme=theme(),
                css=CSS,
                footer_links=[],
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError:
            sys.exit(
                f"error: {told.host}:{told.port or '7860 to 7959'}: cannot be listened at, perhaps since another "
                "program does. Take another --port or --host."
            )
        print(f"{model.folder} at {public or local} (Ctrl-C ends it)", flush=True)
        stop.wait()
        blocks.close(verbose=False)


if __name__ == "__main__":
    main()
