"""Files and report of an evaluation."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tvit_cli.engine.launch import ProcessGroup
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, RunError, SettingsError, plural, shorten
from tvit_cli.files import atomic_write, csv_row
from tvit_cli.report.evaluation import write_evaluation_report
from tvit_cli.report.html import Context
from tvit_cli.results import EvalResult, Note, Report
from tvit_cli.settings.base import flag
from tvit_cli.settings.eval import EvalSettings

METRICS_FILE = "metrics.json"
OTHER_FILES = ("scores.csv", "confusion.csv", "report.html")


def write_result(result: EvalResult, facts: Mapping[str, object]) -> None:
    """Writes metrics.json, scores.csv (a row per video) and confusion.csv (a row per true class).

    `facts` are further entries of metrics.json. Raises RunError if a file cannot be written.
    """
    content = {
        "subset": result.subset,
        **facts,
        "model": str(result.model),
        "metrics": result.metrics,
        "intervals": {name: list(interval) for name, interval in result.intervals.items()},
        "per_class": {
            label: {name: getattr(score, name) for name in ("videos", "right", "precision", "recall", "f1")}
            for label, score in result.per_class.items()
        },
        "confused": [{"label": true, "said": wrong, "videos": n} for true, wrong, n in result.confused],
        "calibration": [asdict(bin) for bin in result.calibration],
        "unreadable": result.unreadable,
        "seconds": round(result.seconds, 3),
        "videos_per_second": round(result.metrics["videos"] / result.seconds, 3),
    }
    labels, counts = result.labels, result.counts
    scores: list[tuple[str, ...]] = []
    for a in result.answers:
        found = [f"{score:.6f}" for score in a.scores]
        own = dict(zip(labels, found, strict=False)).get(a.video.label, "")
        scores.append((a.video.name, a.video.group or "", a.video.label, a.predicted, own, *found))
    confusion = ((true, *(counts.get((true, predicted), 0) for predicted in labels)) for true in labels)
    write_json(result.output / METRICS_FILE, content)
    with _output_folder(result.output):
        for name, header, rows in (
            ("scores.csv", ("video", "group", "label", "predicted", "label_score", *labels), scores),
            ("confusion.csv", ("label", *labels), confusion),
        ):
            with (
                atomic_write(result.output / name) as path,
                path.open("w", newline="", encoding="utf-8") as file,
            ):
                csv.writer(file).writerows(map(csv_row, (header, *rows)))


def write_json(path: Path, content: object) -> None:
    """Writes indented JSON, ASCII only, and makes its folder. Raises RunError."""
    with _output_folder(path.parent), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _output_folder(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}). Free some space, or choose another --output."
        ) from error


def check_replaced(folder: Path, own: str, key: str, others: Sequence[str], report: Report) -> None:
    """Reports that earlier results are replaced: those of a folder whose JSON file `own` has the `key`.

    Raises SettingsError for files of the same names that are no results.
    """
    if not (found := [name for name in (own, *others) if (folder / name).is_file()]):
        return
    try:
        is_own = key in json.loads((folder / own).read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        is_own = False
    another = "name another folder with --output."
    if not is_own:
        raise SettingsError(
            f"{folder}: has files that are no results: {shorten(found)}. To keep them, {another}"
        )
    report(Note(f"Replaces the results in {folder}. To keep them, {another}"))


def read_metrics(output: Path) -> dict[str, float]:
    """The metrics of an evaluation's folder. Raises DataError if they cannot be read."""
    path = output / METRICS_FILE
    try:
        metrics = json.loads(path.read_text("utf-8"))["metrics"]
        return {str(name): float(value) for name, value in metrics.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: no metrics can be read ({type(error).__name__}: {error}). "
            f"Run the evaluation again, or remove {output}."
        ) from error


def write_page(folder: Path, write: Callable[[], Path], report: Report) -> Path | None:
    """Returns the path of the page that `write` wrote; None, with a warning, if it raises OSError."""
    try:
        return write()
    except OSError as error:
        report(Note(f"{folder}: the report could not be written ({error.strerror}).", "warning"))
        return None


def write_report(
    result: EvalResult,
    settings: EvalSettings,
    trained: Trained,
    facts: Mapping[str, Any],
    group: ProcessGroup,
    report: Report,
) -> Path | None:
    """Writes report.html and plots/ beside metrics.json and returns the page's path; a failure is a warning.

    `facts` are those of metrics.json.
    """
    card, views, size = trained.card, facts["views"], trained.card.preprocessing.frame_size
    videos, recordings = result.metrics["videos"], len({answer.video.unit for answer in result.answers})
    is_counted = result.unreadable and settings.unreadable == "wrong"
    shown = "one clip, the centre crop"
    if views != {"clips_per_video": 1, "crops_per_clip": 1, "flip": False}:
        crops = f"{views['crops_per_clip']} crops{' × mirrored or not' if views['flip'] else ''}"
        shown = f"{views['clips_per_video']} clips in time × {crops} of each video, scores averaged"
    setup = {
        "model": f"{trained.folder}{'' if card.base is None else f', from {card.base.name}'}",
        "weights": f"sha256 {card.weights_sha256[:16]}…, written by tvit {card.tvit_version}",
        "network": f"{sum(p.numel() for p in trained.model.parameters()):,} parameters, "
        f"{card.model.get('attention', '')} attention",
        "data": f"{facts['data']}, split {facts['split']}",
        "subset": f"{result.subset}: {videos:.0f} videos, {recordings} groups",
        "left out": plural(len(result.unreadable), "video") + (", counted as wrong" if is_counted else ""),
        "clip": f"{card.preprocessing.n_frames} frames of {size}×{size} pixels, one of each equal share of a video",
        "views": shown,
        "frames": f"from the {facts['frames']}",
        "order": "frames shuffled" if settings.shuffle_frames else "as filmed",
        "speed": f"{videos / result.seconds:.1f} videos/s, decoding included: {trained.device} × "
        f"{group.processes}, {settings.per_gpu_batch_size} clips at once",
    }
    model = shlex.quote(str(result.model))
    commands = [
        ("Repeat this evaluation", reproduce_command(settings, ["--model", str(result.model)])),
        ("Label videos", f"tvit predict VIDEO --model {model}"),
        ("Explain a label", f"tvit predict VIDEO --model {model} --explain why.png"),
        ("Export the model", f"tvit export {model} --format onnx"),
    ]
    context = Context(setup, commands, trained.device)
    return write_page(result.output, lambda: write_evaluation_report(result, context), report)


def reproduce_command(settings: EvalSettings, models: Sequence[str]) -> str:
    """The command of the same evaluation; `models` are the options that name them."""
    words = ["tvit", "eval", *models]
    given = settings.model_dump(mode="json", exclude_defaults=True, exclude={"model", "compare"})
    for name, value in given.items():
        words += [flag(name)] if value is True else [flag(name), str(value)]
    return shlex.join(words)
