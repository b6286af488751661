"""`tvit predict`: labels for videos that nobody has labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvit_cli.data.layout import Video
from tvit_cli.data.video import VIDEO_SUFFIXES
from tvit_cli.engine.events import Note, Progress, Report, silent
from tvit_cli.engine.scoring import score
from tvit_cli.engine.source import default_workers
from tvit_cli.engine.trained import open_trained, pick_device
from tvit_cli.errors import DataError
from tvit_cli.settings.predict import PredictSettings

VIDEOS_PER_WORKER = 16  # fewer are decoded in this process sooner than a worker has started


@dataclass(frozen=True)
class Prediction:
    """The best labels of one video with their scores, best first; or why there are none."""

    path: Path
    labels: tuple[tuple[str, float], ...] = ()
    error: str = ""


@dataclass(frozen=True)
class PredictResult:
    """One prediction per video, in the order of the paths given."""

    predictions: tuple[Prediction, ...]
    model: Path
    top_k: int


def predict(settings: PredictSettings, report: Report = silent) -> PredictResult:
    """Label videos, preprocessed as the model's own evaluation does it.

    A video that cannot be read gets a Prediction with the reason. Raises DataError for a path that does not
    exist or a folder without videos, ModelError for the model.
    """
    paths = find_videos(settings.paths)
    trained = open_trained(
        settings.model,
        working_directory=settings.working_directory,
        device=pick_device(settings.device),
    )
    report(Note(f"Model: {trained.folder}"))
    labels = trained.card.labels
    top_k = min(settings.top_k, len(labels))
    if top_k < settings.top_k:
        report(
            Note(
                f"--top-k {settings.top_k}: the model has {len(labels)} classes, so {top_k} are shown.",
                "warning",
            )
        )
    videos = [Video(path=p, name=str(p), label=labels[0], subset="test", group=None) for p in paths]
    scores = score(
        trained.model,
        videos,
        labels,
        trained.card.preprocessing,
        device=trained.device,
        batch_size=settings.per_gpu_batch_size,
        workers=min(default_workers(), len(paths) // VIDEOS_PER_WORKER),
        progress=lambda done, total: report(Progress("reading videos", done, total)),
    )
    values, indices = scores.logits.double().softmax(1).sort(dim=1, descending=True, stable=True)
    best = {
        video: tuple((labels[i], v) for v, i in zip(row_values[:top_k], row_indices[:top_k], strict=True))
        for video, row_values, row_indices in zip(
            scores.indices.tolist(), values.tolist(), indices.tolist(), strict=True
        )
    }
    return PredictResult(
        predictions=tuple(
            Prediction(path, best.get(i, ()), scores.errors.get(i, "")) for i, path in enumerate(paths)
        ),
        model=trained.folder,
        top_k=top_k,
    )


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, folders as all videos below them, sorted."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"{path}: no video in this folder.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder.")
    return found
