"""Demo page of a trained model: label, explanation and timeline of a video.

    python -m pip install "tvit[demo]"
    python examples/gradio_demo.py [--model FOLDER] [--host 127.0.0.1] [--port 7860] [--share]

Without --model, the newest model below working_directory/ is used. Nothing leaves the machine without --share.
Uploads are deleted after an hour, and all of them when the demo ends. Requests are limited in frames and time, and
the timeline of a client that has left is cancelled.
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
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import simplejpeg

import tvit_cli
from tvit_cli import RunError, TvitError, VideoError

# Gradio reads these when it is imported.
TEMPORARY = tempfile.TemporaryDirectory(prefix="tvit-demo-", ignore_cleanup_errors=True)
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": f"{TEMPORARY.name}/gradio"}
try:
    import gradio as gr
except ImportError:
    sys.exit('The demo needs Gradio: python -m pip install "tvit[demo]"')

T = TypeVar("T")
CheckIn = Callable[
    ..., None
]  # called with the seconds done and the length, where it is known; raises to cancel

BEST_LABEL = "the best label"
LONG_VIDEO = ("MoveRight", "Grow", "TurnClockwise", "MoveUp")  # motions of the long example
NO_EXPLANATION = "The explanation of the label appears here."
NO_TIMELINE = "The timeline appears here."
NO_CAPTION = tvit_cli.Segment(-1.0, -1.0, "", 0.0)  # before the first frame
HOUR = 3600  # seconds
POLL = 0.5  # seconds between two checks whether the client is still connected
MAX_FRAMES, MAX_SECONDS = 30_000, 300
PLAYED = {".mp4": {"h264", "av1", "vp9"}, ".webm": {"vp8", "vp9", "av1"}}  # by browsers
MODEL = "model"  # concurrency group: the model computes one request at a time
CSS = """
.gradio-container {max-width: 1120px !important; margin: 0 auto}
#head h1 {margin: .6rem 0 0; font-size: 1.75rem; letter-spacing: -.02em}
.dim {margin: 0; color: var(--body-text-color-subdued)}
.card {padding: 14px 16px; border: 1px solid var(--border-color-primary); border-radius: var(--block-radius);
  background: var(--block-background-fill); overflow-x: auto; contain: inline-size}
.drawn {width: 100%; min-width: 600px}
.dark .on-light, body:not(.dark) .on-dark {display: none}
.frames {display: grid; grid-template-columns: repeat(auto-fit, minmax(64px, 1fr)); gap: 6px; margin-top: 10px}
.frames img {width: 100%; max-width: 224px; border-radius: 6px}
.html-container {padding: 0 !important}
.card table {width: 100%; margin-top: 10px; border-collapse: collapse; font-variant-numeric: tabular-nums}
.card :is(table, thead, tbody, tr) {border: none !important}
.card table :is(th, td) {padding: 5px 10px; text-align: left; border: none !important;
  border-bottom: 1px solid var(--border-color-primary) !important}
footer {display: none !important}
"""


class Page:
    """Callbacks of the page, with limits of a request; written videos go to `folder`."""

    def __init__(
        self,
        model: tvit_cli.Model,
        folder: Path,
        max_frames: int = MAX_FRAMES,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self.model = model
        self.folder = folder
        self.max_frames = max_frames
        self.max_seconds = max_seconds

    def play(self, video: str | None) -> Iterator[Any]:
        """A player of the video, or of a copy in a format that browsers play; none if it cannot be read."""
        yield gr.update(value=None, visible=False)
        if video is None:
            return
        with suppress(TvitError, av.FFmpegError, IndexError):
            path = Path(video)
            with av.open(path) as container:
                codec = container.streams.video[0].codec_context.name
            if codec in PLAYED.get(path.suffix.lower(), ()):
                yield gr.update(value=str(path), visible=True)
                return
            self.check(path)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                copy = Path(folder) / f"{path.stem}.mp4"
                yield from run_in_thread(
                    lambda check_in: self.model.annotate(
                        copy, path, [NO_CAPTION], progress=lambda done, total: check_in()
                    ),
                    self.max_seconds,
                )
                yield gr.update(value=str(copy), visible=True)

    def label(self, video: str | None, top_k: int) -> dict[str, float]:
        """The best labels with their scores."""
        with page_errors(path := uploaded(video)):
            self.check(path)
            return dict(self.model.predict(path, top_k=int(top_k)).labels)

    def explain(self, video: str | None, label: str) -> tuple[str, str]:
        """The model's input frames, and the explanation of a label."""
        with page_errors(path := uploaded(video)):
            self.check(path)
            explanation = self.model.explain(path, label=None if label == BEST_LABEL else label)
        pictures = [self.model.draw_explanation(explanation, dark=dark) for dark in (False, True)]
        text = f"Relevance for {explanation.label}: {explanation.deletion.verdict}"
        note = (
            "Bright patches are relevant for the label. Below: the share of each frame, and a deletion test."
        )
        return self.frames(explanation), card(note, drawn(pictures, text))

    def when(
        self,
        video: str | None,
        window: float,
        stride: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio requires this default)
    ) -> Iterator[Any]:
        """The timeline as a picture with its segments as a table, and a sentence on the whole video."""

        def played(done: float, total: float | None) -> None:
            progress(min(1.0, done / total) if total else None, f"{clock(done)} played")

        with page_errors(path := uploaded(video)):
            timeline = yield from run_in_thread(
                lambda check_in: self.timeline(path, window, stride, check_in), self.max_seconds, played
            )
        yield self.drawn_timeline(timeline, window), summary(timeline)

    def write(self, video: str | None, window: float, stride: float) -> Iterator[Any]:
        """A copy of the video with its labels as captions, for browsers; Gradio copies it again."""
        with page_errors(path := uploaded(video)), tempfile.TemporaryDirectory(dir=self.folder) as folder:
            output = Path(folder) / f"{path.stem}-labelled.mp4"

            def work(check_in: CheckIn) -> None:
                timeline = self.timeline(path, window, stride, check_in)
                self.model.annotate(output, path, timeline.segments, progress=lambda done, total: check_in())

            yield from run_in_thread(work, self.max_seconds)
            yield str(output)

    def timeline(self, path: Path, window: float, stride: float, check_in: CheckIn) -> tvit_cli.Timeline:
        """The timeline of a video within the limits."""
        self.check(path)
        return self.model.timeline(path, window=window, stride=min(stride, window), progress=check_in)

    def check(self, path: Path) -> None:
        """Raises VideoError for a video with too many frames."""
        if (frames := count_frames(path)) > self.max_frames:
            raise VideoError(
                f"{path}: has {frames:,} frames; this page takes videos of at most {self.max_frames:,}. "
                "Upload a shorter part of it."
            )

    def frames(self, explanation: tvit_cli.Explanation) -> str:
        """The model's input frames."""
        encoded = [
            b64encode(simplejpeg.encode_jpeg(frame)).decode()
            for frame in self.model.input_frames(explanation)
        ]
        tags = [f'<img alt="Frame {n}" src="data:image/jpeg;base64,{x}">' for n, x in enumerate(encoded, 1)]
        return card(
            f"The {len(tags)} input frames of the model", f'<div class="frames">{"".join(tags)}</div>'
        )

    def drawn_timeline(self, timeline: tvit_cli.Timeline, window: float) -> str:
        """The timeline as a picture and a table; a sentence for a video shorter than a window."""
        if timeline.window < window:
            return card(
                f"The video lasts {timeline.seconds:.1f} s, less than a window of {window:g} s, so it is one clip. "
                "Take a longer video, or a shorter window."
            )
        text = ", ".join(f"{s.label} from {clock(s.start)} to {clock(s.end)}" for s in timeline.segments)
        note = f"Smoothed scores of windows of {timeline.window:g} s (shade), and segments (bars)."
        pictures = [self.model.draw_timeline(timeline, dark=dark) for dark in (False, True)]
        return card(note, drawn(pictures, text) + table(timeline))

    def about(self) -> str:
        """Summary of the model."""
        card = self.model.card
        facts = [
            f"{len(card.labels)} classes",
            f"{card.preprocessing.n_frames} frames of {card.preprocessing.frame_size} pixels",
            f"{card.model['attention']} attention",
        ]
        if (top1 := card.metrics.get("val_video_top1")) is not None:
            facts.append(f"top-1 of {top1:.3f} on {card.metrics.get('val_videos', 0):.0f} validation videos")
        return " · ".join(facts)


def run_in_thread(
    work: Callable[[CheckIn], T],
    most: float,
    progress: Callable[[float, float | None], None] | None = None,
) -> Generator[Any, None, T]:
    """Returns the result of `work`, done in a thread, and yields meanwhile.

    When the client leaves, Gradio closes this generator. Then, or after `most` seconds, the calls of
    `check_in(done, total)` in `work` raise RunError.
    """
    left = threading.Event()
    end = time.monotonic() + most
    done: list[tuple[float, float | None]] = []
    future: Future[T] = Future()

    def check_in(*now: Any) -> None:
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
            future.set_result(work(check_in))
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


def uploaded(video: str | None) -> Path:
    """The uploaded or chosen file."""
    if video is None:
        raise gr.Error("Upload a video first, or pick an example.", print_exception=False)
    return Path(video)


@contextmanager
def page_errors(video: Path) -> Iterator[None]:
    """Shows errors of the engine in the page, with the uploaded file's own name."""
    try:
        yield
    except TvitError as error:
        text = escape(str(error).replace(str(video), video.name))
        raise gr.Error(text, duration=None, print_exception=False) from error


def count_frames(path: Path) -> int:
    """Frames of a video by its packets, without decoding; 0 for a file that is none."""
    try:
        with av.open(str(path)) as container:
            return sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.FFmpegError, IndexError):  # the model names the fault
        return 0


def clock(seconds: float) -> str:
    """A time in minutes and seconds. 67.5 -> 1:07.5"""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{minutes:.0f}:{rest:04.1f}".removesuffix(".0")


def summary(timeline: tvit_cli.Timeline) -> str:
    """The label with the most time and the others, if a video shows several."""
    times: defaultdict[str, float] = defaultdict(float)
    for segment in timeline.segments:
        times[segment.label] += segment.end - segment.start
    (label, most), *others = sorted(times.items(), key=lambda item: -item[1])
    if not others:
        return ""
    rest = ", ".join(f"{name} {clock(seconds)}" for name, seconds in others)
    whole = clock(sum(times.values()))
    if most < sum(times.values()) / 2:
        return card(f"{len(times)} actions, so no label fits all {whole}: {label} {clock(most)}, {rest}")
    return card(f"Mostly {label}, {clock(most)} of {whole}. Also {rest}")


def table(timeline: tvit_cli.Timeline) -> str:
    """The segments, a row each."""
    rows = [(clock(s.start), clock(s.end), escape(s.label), f"{s.score:.3f}") for s in timeline.segments]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr><th>start<th>end<th>label<th>score</tr>{body}</table>"


def drawn(pictures: list[bytes], text: str) -> str:
    """PNGs for the light and the dark theme, with `text` as their description."""
    return "".join(
        f'<img class="drawn on-{name}" alt="{escape(text)}" src="data:image/png;base64,{b64encode(data).decode()}">'
        for name, data in zip(("light", "dark"), pictures, strict=True)
    )


def card(note: str, inside: str = "") -> str:
    """A box with a sentence above its content."""
    return f'<div class="card"><p class="dim">{escape(note)}</p>{inside}</div>'


def make_examples(folder: Path, labels: tuple[str, ...]) -> list[Path]:
    """For a model of the demo motions: a clip of each class, and a video of 32 s with four of them in sequence."""
    if not set(LONG_VIDEO) <= set(labels):
        return []
    tvit_cli.make_motions(folder / "motions", clips_per_group=1, frame_size=128)
    clips = {label: sorted((folder / "motions" / "test" / label).glob("*.avi")) for label in labels}
    long_video = folder / "four-in-a-row.mp4"
    with av.open(str(long_video), "w") as container:
        stream = container.add_stream("mpeg4", rate=12, options={"qmin": "3", "qmax": "3"})
        stream.width = stream.height = 128
        pieces = [tvit_cli.read_video(path)[0] for label in LONG_VIDEO for path in clips[label]]
        for number, picture in enumerate(np.concatenate(pieces)):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return [long_video, *(found[0] for found in clips.values() if found)]


def build(page: Page, examples: list[Path]) -> gr.Blocks:
    """The page."""
    labels, suffixes = page.model.labels, sorted(tvit_cli.VIDEO_SUFFIXES)
    with gr.Blocks(title="tvit", analytics_enabled=False, delete_cache=(HOUR // 6, HOUR)) as blocks:
        gr.HTML(
            f'<h1>Video classification</h1><p class="dim">{escape(page.about())}</p>',
            elem_id="head",
            padding=False,
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                video = gr.File(label="Video", file_types=suffixes, height=150, elem_id="video")
                chips = gr.Column(visible=bool(examples), min_width=300)
                player = gr.Video(
                    label="Player",
                    interactive=False,
                    visible=False,
                    autoplay=True,
                    loop=True,
                    height=220,
                    elem_id="player",
                )
                go = gr.Button("Label it", variant="primary", elem_id="go")
                with gr.Accordion("Options", open=False):
                    top_k = gr.Slider(1, len(labels), min(5, len(labels)), step=1, label="Labels shown")
                    label = gr.Dropdown([BEST_LABEL, *labels], value=BEST_LABEL, label="Label to explain")
                    window = gr.Slider(0.5, 10, 2, step=0.5, label="Timeline: seconds in a window")
                    stride = gr.Slider(0.1, 5, 0.5, step=0.1, label="Timeline: seconds between windows")
            with gr.Column(scale=3, min_width=320):
                scores = gr.Label(label="Label", elem_id="scores")
                whole = gr.HTML(elem_id="whole")
                frames = gr.HTML(elem_id="frames")
        with gr.Tab("Why"):
            why = gr.HTML(card(NO_EXPLANATION), elem_id="why")
        with gr.Tab("When"):
            timeline = gr.HTML(card(NO_TIMELINE), elem_id="timeline")
        with gr.Tab("Video"):
            write = gr.Button("Write the labels into the video", elem_id="write")
            labelled = gr.Video(label="With its labels", interactive=False, height=360, elem_id="labelled")
        video.change(page.play, [video], player, show_progress="hidden")
        starts = [go.click]
        if examples:
            with chips:
                picked = gr.Examples(
                    [[str(path)] for path in examples],
                    inputs=[video],
                    label="Examples",
                    example_labels=[p.stem if p.suffix == ".mp4" else p.parent.name for p in examples],
                )
            starts.append(picked.load_input_event.success)
        for start in starts:  # each step shows its result before the next begins
            cleared = start(blank_page, None, [scores, whole, frames, why, timeline, labelled], queue=False)
            labelling = cleared.success(page.label, [video, top_k], scores, concurrency_id=MODEL)
            explaining = labelling.success(page.explain, [video, label], [frames, why], concurrency_id=MODEL)
            explaining.success(page.when, [video, window, stride], [timeline, whole], concurrency_id=MODEL)
        write.click(page.write, [video, window, stride], labelled, concurrency_id=MODEL)
    return blocks


def blank_page() -> tuple[None, str, str, str, str, None]:
    """Empty outputs, so that no result of an earlier video remains."""
    return None, "", "", card(NO_EXPLANATION), card(NO_TIMELINE), None


def theme() -> gr.themes.Base:
    """The colours of tvit's reports, with system fonts."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="zinc",
        radius_size="lg",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0f1115",
        body_text_color="#1d2230",
        body_text_color_dark="#e6e8ee",
        body_text_color_subdued="#636b7c",
        body_text_color_subdued_dark="#9aa2b3",
        block_background_fill="#ffffff",
        block_background_fill_dark="#16181d",
        border_color_primary="#e3e6ec",
        border_color_primary_dark="#2b2f3a",
        button_primary_background_fill="#2563c9",
        button_primary_background_fill_dark="#2563c9",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="model folder, or a run's; default: the newest one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 for the whole network"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers")
    parser.add_argument("--max-upload-mb", type=int, default=256, help="size limit of a video (256)")
    parser.add_argument(
        "--max-frames", type=int, default=MAX_FRAMES, help=f"frame limit of a video ({MAX_FRAMES})"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=MAX_SECONDS, help=f"seconds for a timeline ({MAX_SECONDS})"
    )
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with TEMPORARY:
        folder = Path(TEMPORARY.name)
        try:
            model = tvit_cli.load_model(options.model)
            examples = make_examples(folder, model.labels)
        except TvitError as error:
            sys.exit(f"error: {error}")
        blocks = build(Page(model, folder, options.max_frames, options.max_seconds), examples)
        try:
            _, local, public = blocks.launch(
                server_name=options.host,
                server_port=options.port,
                share=options.share,
                max_file_size=f"{options.max_upload_mb}mb",
                theme=theme(),
                css=CSS,
                footer_links=[],
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError:
            sys.exit(
                f"error: {options.host}:{options.port or '7860 to 7959'}: the address is in use or not available. "
                "Choose another --port or --host."
            )
        print(f"{model.folder} at {public or local} (Ctrl-C ends it)", flush=True)
        stop.wait()
        blocks.close(verbose=False)


if __name__ == "__main__":
    main()
