"""The proof that an export answers what the model answers, from the video file to the logits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tvit_cli.data.layout import Video, read_layout
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.dataset import find_data, video_root
from tvit_cli.engine.evaluate.scoring import score
from tvit_cli.engine.evaluate.selection import choose_split
from tvit_cli.engine.export.formats import Answerer, Job
from tvit_cli.engine.predict.paths import find_videos
from tvit_cli.errors import DataError, RunError
from tvit_cli.results import Note
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.export import ExportSettings

CLIPS = 20
NOISE_CLIPS = 8
LOGIT_LIMIT = 1e-4
INT8_AGREEMENT = 0.95


@dataclass(frozen=True)
class Reference:
    """Videos, where they come from, and the model's own logits (videos, K)."""

    source: str
    videos: tuple[Path, ...]
    logits: Tensor


@dataclass(frozen=True)
class Parity:
    """How far an export's answers lie from the model's, and how far they may."""

    clips: str
    videos: int
    max_logit_difference: float
    top1_agreement: float
    logit_limit: float | None  # None: not limited, for 8 bits
    agreement_limit: float

    @property
    def passed(self) -> bool:
        """Whether both are within their limits."""
        near = self.logit_limit is None or self.max_logit_difference <= self.logit_limit
        return near and self.top1_agreement >= self.agreement_limit

    def to_dict(self) -> dict[str, Any]:
        """As parity.json holds it."""
        return {**asdict(self), "passed": self.passed}


@contextmanager
def reference(job: Job) -> Iterator[Reference]:
    """The model's logits for real clips: those given, else of its own data; made of noise where there are none.

    Raises DataError for a folder without videos, RunError when none can be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if job.settings.clips is not None:
            source, paths = (
                job.settings.clips.resolve().name,
                [Path(p) for p in find_videos([str(job.settings.clips)])],
            )
        else:
            source, paths = _own_clips(job)
        if not paths:
            source, paths = "seeded noise", _noise(Path(scratch), job)
        yield _answers(job, source, _spread(paths))


def compare(expected: Reference, answer: Answerer, settings: ExportSettings) -> Parity:
    """Ask the export about the same videos.

    One that gives scores is compared by their logarithms: logits but for a constant.
    """
    logits, wanted = answer(expected.videos).double(), expected.logits.double()
    if settings.with_preprocessing:
        wanted = wanted.log_softmax(1)
    return Parity(
        clips=expected.source,
        videos=len(expected.videos),
        max_logit_difference=(logits - wanted).abs().max().item(),
        top1_agreement=(logits.argmax(1) == wanted.argmax(1)).double().mean().item(),
        logit_limit=None if settings.int8 else LOGIT_LIMIT,
        agreement_limit=INT8_AGREEMENT if settings.int8 else 1.0,
    )


def _own_clips(job: Job) -> tuple[str, list[Path]]:
    """Test or val videos of the data that the model was trained on, where they still lie there."""
    choice = choose_split(EvalSettings(), job.trained.card)
    try:
        root = find_data(job.trained.card.settings.get("path_to_data"))
        layout = read_layout(video_root(root) or root, **choice)
    except DataError as error:
        job.report(Note(f"The proof takes made-up clips: {error}", "warning"))
        return "", []
    for subset in ("test", "val"):
        if paths := [video.path for video in layout.subset(subset) if video.path.is_file()]:
            return f"{subset} videos of {root.resolve().name}", paths
    job.report(Note(f"The proof takes made-up clips: {root} has no test or val videos.", "warning"))
    return "", []


def _noise(folder: Path, job: Job) -> list[Path]:
    """Clips of coarse noise that drifts, larger than the model's frames."""
    facts = job.trained.card.preprocessing
    height, width = 2 * (facts.frame_size // 2) + 16, 2 * (facts.frame_size * 5 // 8) + 16
    paths = []
    for seed in range(NOISE_CLIPS):
        generator = np.random.default_rng(seed)
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = np.kron(coarse, np.ones((-(-height // 8), -(-width // 8), 1), dtype=np.uint8))
        frames = [np.roll(picture, (seed - 3) * t, axis=(t + seed) % 2) for t in range(2 * facts.n_frames)]
        paths.append(folder / f"noise-{seed}.avi")
        write_video(paths[-1], np.stack(frames)[:, :height, :width])
    return paths


def _spread(paths: Sequence[Path]) -> list[Path]:
    """At most CLIPS of them, evenly over the list, so that all classes have their share."""
    count = min(CLIPS, len(paths))
    return [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]


def _answers(job: Job, source: str, paths: Sequence[Path]) -> Reference:
    trained, labels = job.trained, job.trained.card.labels
    scores = score(
        trained.model,
        [Video(path=p, name=str(p), label=labels[0], subset="test", group=None) for p in paths],
        labels,
        trained.card.preprocessing,
        device=trained.device,
        batch_size=1,
        workers=0,
    )
    if not len(scores.indices):
        raise RunError(f"{source}: none of the {len(paths)} clips can be read. Name others with --clips.")
    return Reference(source, tuple(paths[i] for i in scores.indices.tolist()), scores.logits)
