"""`tvit eval`: a trained model scored on a subset."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from tvit_cli.data.layout import Video
from tvit_cli.engine.events import Note, Progress, Report, silent
from tvit_cli.engine.metrics import video_metrics
from tvit_cli.engine.scoring import Scores, score
from tvit_cli.engine.source import default_workers, open_source
from tvit_cli.engine.trained import Trained, open_trained
from tvit_cli.errors import DataError, RunError
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class EvalResult:
    """Metrics of a subset, per-class counts, and where they were written.

    `per_class` maps a label to (videos, right answers); `unreadable` a video's name to the reason.
    """

    metrics: dict[str, float]
    per_class: dict[str, tuple[int, int]]
    unreadable: dict[str, str]
    subset: str
    model: Path
    output: Path
    notes: tuple[str, ...]


def evaluate(settings: EvalSettings, report: Report = silent) -> EvalResult:
    """Score a model folder on a subset and write metrics.json and scores.csv.

    Labels, frame size, sampling and normalisation come from the model folder. Videos that cannot be read are
    reported and left out. Raises ModelError, DataError, or RunError when no video of the subset can be read.
    """
    trained = open_trained(
        settings.model, working_directory=settings.working_directory, device=settings.device
    )
    report(Note(f"Model: {trained.folder}"))
    choice = _choose_videos(settings, trained.card)
    source = open_source(
        settings.path_to_data or trained.card.settings.get("path_to_data"),
        group_pattern=str(choice["group_pattern"]),
        val_groups=str(choice["val_groups"]),
        test_groups=str(choice["test_groups"]),
        split=int(choice["split"]),
        need_training=False,
        report=report,
    )
    videos = source.layout.subset(settings.subset)
    _check_labels(videos, trained, settings)
    scores = score(
        trained.model,
        videos,
        trained.card.labels,
        trained.card.preprocessing,
        device=trained.device,
        batch_size=settings.per_gpu_batch_size,
        workers=default_workers() if settings.num_workers is None else settings.num_workers,
        shuffle_seed=settings.seed if settings.shuffle_frames else None,
        store=source.store,
        progress=lambda done, total: report(Progress("scoring videos", done, total)),
    )
    if not len(scores.indices):
        raise RunError(
            f"{source.layout.root}: none of the {len(videos)} {settings.subset} videos can be read."
        )
    for index, reason in scores.errors.items():
        if videos[index].name not in source.unreadable:
            report(Note(f"left out: {videos[index].name}: {reason}", "warning"))
    facts = {
        "data": str(source.root),
        "frames": "videos" if source.store is None else "frame store",
        **choice,
    }
    return _write_result(settings, trained, videos, scores, facts)


def read_metrics(output: Path) -> dict[str, float]:
    """The metrics that an evaluation wrote to its folder."""
    content = json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))
    metrics: dict[str, float] = content["metrics"]
    return metrics


def _choose_videos(settings: EvalSettings, card: ModelCard) -> dict[str, str | int]:
    """How the subsets are made: as was given, else as in training.

    On the data that the model was trained on, the groups that were held out then are meant by name: videos that
    came later must not move what was trained on into the test subset.
    """
    chosen: dict[str, str | int] = {}
    for name in ("group_pattern", "val_groups", "test_groups", "split"):
        given = getattr(settings, name)
        default = TrainSettings.model_fields[name].default
        chosen[name] = card.settings.get(name, default) if given is None else given
        groups = card.held_out.get(name.removesuffix("_groups"))
        if given is None and settings.path_to_data is None and groups is not None:
            chosen[name] = "".join(f"{group}," for group in groups) or "none"
    return chosen


def _check_labels(videos: tuple[Video, ...], trained: Trained, settings: EvalSettings) -> None:
    if not videos:
        raise DataError(
            f"--subset {settings.subset}: the data has no such videos. "
            f"Hold groups out for it with --{settings.subset}-groups, or choose another --subset."
        )
    unknown = sorted({video.label for video in videos} - set(trained.card.labels))
    if unknown:
        raise DataError(
            f"{len(unknown)} classes of the data are unknown to the model ({', '.join(unknown[:5])} …). "
            f"It knows {len(trained.card.labels)}: {', '.join(trained.card.labels[:5])} …"
        )


def _write_result(
    settings: EvalSettings,
    trained: Trained,
    videos: tuple[Video, ...],
    scores: Scores,
    facts: dict[str, str | int],
) -> EvalResult:
    labels = trained.card.labels
    notes = []
    if settings.top_k > len(labels):
        notes.append(
            f"--top-k {settings.top_k}: the model has {len(labels)} classes, so top-{len(labels)} is shown."
        )
    metrics = video_metrics(scores.logits, scores.labels, top_k=settings.top_k)
    metrics["unreadable"] = float(len(scores.errors))
    right = scores.logits.argmax(1) == scores.labels
    per_class = {
        label: (int((scores.labels == i).sum()), int(right[scores.labels == i].sum()))
        for i, label in enumerate(labels)
    }
    per_class = {label: counts for label, counts in per_class.items() if counts[0]}
    if settings.unreadable == "wrong":
        for index in scores.errors:
            count, hits = per_class.get(videos[index].label, (0, 0))
            per_class[videos[index].label] = (count + 1, hits)
        metrics |= _with_wrong(metrics, per_class, len(scores.errors))
    name = settings.subset + ("-shuffled" if settings.shuffle_frames else "")
    output = settings.output or trained.folder.parent / "eval" / name
    result = EvalResult(
        metrics=metrics,
        per_class=per_class,
        unreadable={videos[index].name: reason for index, reason in scores.errors.items()},
        subset=name,
        model=trained.folder,
        output=output,
        notes=tuple(notes),
    )
    output.mkdir(parents=True, exist_ok=True)
    _write_metrics(output / METRICS_FILE, result, {**facts, "unreadable_videos": settings.unreadable})
    _write_scores(output / "scores.csv", videos, scores, labels)
    return result


def _with_wrong(
    metrics: dict[str, float], per_class: dict[str, tuple[int, int]], unreadable: int
) -> dict[str, float]:
    """What changes when unreadable videos count as wrong answers; the loss stays that of the others."""
    read = metrics["videos"]
    shares = {k: v * read / (read + unreadable) for k, v in metrics.items() if k.startswith("video_top")}
    recall = sum(right / count for count, right in per_class.values()) / len(per_class)
    return {**shares, "videos": read + unreadable, "mean_class_accuracy": recall}


def _write_metrics(path: Path, result: EvalResult, facts: dict[str, str | int]) -> None:
    content = {
        "subset": result.subset,
        **facts,
        "model": str(result.model),
        "metrics": result.metrics,
        "per_class": {label: {"videos": n, "right": right} for label, (n, right) in result.per_class.items()},
        "unreadable": result.unreadable,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_scores(path: Path, videos: tuple[Video, ...], scores: Scores, labels: tuple[str, ...]) -> None:
    """One row per video: name, true and predicted label, then the score of every class."""
    softmax = scores.logits.double().softmax(1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "label", "predicted", *labels])
        for index, label, row in zip(scores.indices.tolist(), scores.labels.tolist(), softmax, strict=True):
            values = [f"{value:.6f}" for value in row.tolist()]
            writer.writerow([videos[index].name, labels[label], labels[int(row.argmax())], *values])
