"""Parity check of an export: its logits against the trained model's, from the video file on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from tvit_cli.data.layout import read_layout
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.dataset import find_data, video_root
from tvit_cli.engine.evaluate.scoring import score_locations
from tvit_cli.engine.evaluate.selection import choose_split
from tvit_cli.engine.export.formats import Format, Job
from tvit_cli.engine.predict.paths import find_videos
from tvit_cli.errors import DataError, RunError
from tvit_cli.results import Note, Progress
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.eval import EvalSettings

CLIPS = 20
LOGIT_LIMIT = 1e-4
INT8_AGREEMENT = 0.95


Reference = tuple[str, list[Path], Tensor]  # source of the videos, videos, the model's logits (videos, K)


@dataclass(frozen=True)
class Parity:
    """Differences between an export's outputs and the model's, and their limits."""

    clips: str
    videos: int
    max_logit_difference: float
    top1_agreement: float
    logit_limit: float | None  # None: no limit, for int8
    agreement_limit: float

    @property
    def passed(self) -> bool:
        """Whether both are within their limits."""
        near = self.logit_limit is None or self.max_logit_difference <= self.logit_limit
        return near and self.top1_agreement >= self.agreement_limit


@contextmanager
def reference(job: Job) -> Iterator[Reference]:
    """The model's logits of clips: those of --clips, of its own data, or seeded noise.

    Raises DataError for a folder without videos, RunError where no clip can be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if (clips := job.settings.clips) is not None:
            source, paths = clips.resolve().name, [Path(path) for path in find_videos([str(clips)])]
        else:
            source, paths = _dataset_clips(job)
        paths = _spread(paths or _noise_clips(Path(scratch), job.trained.card.preprocessing))
        scores = score_locations(
            job.trained,
            paths,
            progress=lambda done, total: job.report(Progress("scoring clips", done, total)),
        )
        if not len(scores.indices):
            raise RunError(f"{source}: none of the {len(paths)} clips can be read. Name others with --clips.")
        yield source, [paths[i] for i in scores.indices.tolist()], scores.logits


def check_parity(form: Format, folder: Path, expected: Reference, job: Job) -> Parity:
    """Compares an export, loaded from its folder, with the reference; probabilities by their logarithms.

    Raises RunError where a limit is exceeded, or where the export or a clip cannot be read.
    """
    settings, (source, videos, wanted) = job.settings, expected
    rows: list[Tensor] = []
    job.report(Progress("proving parity", 0, len(videos)))
    try:
        with form.load(folder) as predict, torch.inference_mode():
            for video in videos:
                rows.append(predict(video))
                job.report(Progress("proving parity", len(rows), len(videos)))
            logits = torch.stack(rows).double()
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"--format {settings.format}: the parity check broke off, and nothing was written: a file cannot be "
            f"read ({error}). Check the disk, then export again."
        ) from error
    wanted = wanted.double().log_softmax(1) if settings.with_preprocessing else wanted.double()
    parity = Parity(
        clips=source,
        videos=len(videos),
        max_logit_difference=(logits - wanted).abs().max().item(),
        top1_agreement=(logits.argmax(1) == wanted.argmax(1)).double().mean().item(),
        logit_limit=None if settings.int8 else LOGIT_LIMIT,
        agreement_limit=INT8_AGREEMENT if settings.int8 else 1.0,
    )
    if not parity.passed:
        limit = "" if parity.logit_limit is None else f" (at most {parity.logit_limit:g})"
        raise RunError(
            f"--format {settings.format}: the export's outputs differ from the model's, so nothing was written. "
            f"On {parity.videos} clips ({parity.clips}): largest difference of a logit "
            f"{parity.max_logit_difference:.2g}{limit}, top-1 agreement {parity.top1_agreement:.3f} (at least "
            f"{parity.agreement_limit:g}). Export {'without --int8' if settings.int8 else 'in another --format'}."
        )
    return parity


def _dataset_clips(job: Job) -> tuple[str, list[Path]]:
    """Test or val videos of the model's data set; none, with a warning, where they are gone."""
    try:
        root = find_data(job.trained.card.settings.get("path_to_data"))
        layout = read_layout(video_root(root) or root, **choose_split(EvalSettings(), job.trained.card))
    except DataError as error:
        reason = str(error)
    else:
        for subset in ("test", "val"):
            if paths := [video.path for video in layout.subset(subset) if video.path.is_file()]:
                return f"{subset} videos of {root.resolve().name}", paths
        reason = f"{root} has no test or val videos."
    job.report(Note(f"The parity check uses generated clips: {reason}", "warning"))
    return "seeded noise", []


def _noise_clips(folder: Path, facts: Preprocessing) -> list[Path]:
    """Videos of moving coarse noise, each larger than the model's frames."""
    height, width = 2 * (facts.frame_size // 2) + 16, 2 * (facts.frame_size * 5 // 8) + 16
    paths = [folder / f"noise-{seed}.avi" for seed in range(8)]
    for seed, path in enumerate(paths):
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = np.kron(coarse, np.ones((-(-height // 8), -(-width // 8), 1), dtype=np.uint8))
        frames = [np.roll(picture, (seed - 3) * t, axis=(t + seed) % 2) for t in range(2 * facts.n_frames)]
        write_video(path, np.stack(frames)[:, :height, :width])
    return paths


def _spread(paths: Sequence[Path]) -> list[Path]:
    """At most CLIPS of them, evenly over the list and so over the classes."""
    count = min(CLIPS, len(paths))
    return [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]
