"""`tvit eval`: a trained model scored on a subset."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from tvit_cli.data.layout import SplitChoice, Video, match_labels
from tvit_cli.engine.dataset import ClipFormat, DataSource, data_name, find_data, open_dataset, video_root
from tvit_cli.engine.distributed import worker_count
from tvit_cli.engine.evaluate import metrics
from tvit_cli.engine.evaluate.scoring import Scores, Views, clips_to_score, score
from tvit_cli.engine.evaluate.selection import choose_split, find_bias, is_training_data
from tvit_cli.engine.launch import ProcessGroup, join_process_group
from tvit_cli.engine.trained import Trained, open_trained
from tvit_cli.errors import DataError, RunError, SettingsError, plural, shorten
from tvit_cli.files import check_writable
from tvit_cli.results import EvalResult, Note, Progress, Report, VideoPrediction, silent, working
from tvit_cli.settings.eval import EvalSettings

MOST_NOTES = 5  # on single videos that are shown


@dataclass(frozen=True)
class Selection:
    """A model, with its classes spelt as in the data, and the videos to score."""

    trained: Trained
    source: DataSource
    choice: SplitChoice
    videos: tuple[Video, ...]


def evaluate(
    settings: EvalSettings,
    report: Report = silent,
    group: ProcessGroup | None = None,
    selection: Selection | None = None,
) -> EvalResult:
    """Scores a model folder on a subset and writes metrics.json, scores.csv, confusion.csv and report.html.

    Labels, frame size, sampling and normalisation come from the model folder. Unreadable videos are reported, and
    left out or counted as wrong. All ranks share the videos and get the result; callers that have joined the
    process `group` or selected the videos pass them. Raises ModelError, DataError, SettingsError for views that the
    preprocessing does not allow, or RunError when no video can be read.
    """
    group = group or join_process_group(settings.device)
    report = report if group.is_main else silent
    trained = (
        open_trained(
            settings.model,
            working_directory=settings.working_directory,
            device=group.device,
            mixed_precision=settings.mixed_precision,
        )
        if selection is None
        else selection.trained
    )
    report(Note(f"Model: {trained.folder}"))
    output = settings.output or results_folder(settings, trained)
    if group.is_main:
        from tvit_cli.engine.evaluate import files  # imports PIL

        check_writable("--output", output, output)
        files.check_replaced(output, files.METRICS_FILE, "metrics", files.OTHER_FILES, report)
    for note in trained.notes:
        report(Note(note, "warning"))
    preprocessing = trained.card.preprocessing
    if (crops := settings.crops_per_clip) > 1 and preprocessing.resize == "squash":
        text = "this model squashes whole frames to a square, which has one crop. Leave it out."
        raise SettingsError(f"--crops-per-clip {crops}: {text}")
    views = Views(settings.clips_per_video, crops, settings.flip)
    selection = selection or select_videos(settings, trained, report)
    trained, source, videos = selection.trained, selection.source, selection.videos
    # On a CPU, `auto` times products, and ranks may differ.
    trained = replace(trained, precision=group.gather(trained.precision)[0])
    bias, leaks = find_bias(settings, trained, source)
    for warning in (*bias, *leaks):
        report(Note(warning, "warning"))
    seed = settings.seed if settings.shuffle_frames else None
    clips = clips_to_score(
        videos, trained.card.labels, preprocessing, views=views, shuffle_seed=seed, store=source.store
    )
    started = time.perf_counter()
    scores = score(
        trained.model,
        clips,
        group,
        batch_size=settings.per_gpu_batch_size,
        workers=worker_count(settings.num_workers),
        autocast=trained.autocast,
        progress=lambda done, total: report(Progress("scoring videos", done, total)),
    )
    seconds = time.perf_counter() - started
    if not len(scores.indices):
        raise RunError(
            f"{source.layout.root}: none of the {len(videos)} {settings.subset} videos can be read. Check them."
        )
    trained.check_scores(scores.logits)
    for index, reason in scores.errors.items():
        if videos[index].name not in source.unreadable:
            report(Note(f"left out: {videos[index].name}: {reason}", "warning"))
    for index, note in islice(scores.notes.items(), MOST_NOTES):
        report(Note(f"{videos[index].name}: {note}.", "warning"))
    if (more := len(scores.notes) - MOST_NOTES) > 0:
        report(Note(f"Notes of this kind on {plural(more, 'more video')} are left out.", "warning"))
    warnings = (*trained.notes, *bias, *leaks)
    result = replace(
        _result(settings, trained, videos, scores, seconds), clips=clips, warnings=warnings, leaks=leaks
    )
    facts: dict[str, object] = {
        "data": str(source.root),
        "frames": "videos" if source.store is None else "frame store",
        "mixed_precision": trained.precision,
        **selection.choice,
        "views": asdict(views),
        "unreadable_videos": settings.unreadable,
        "warnings": list(warnings),
        "leaks": list(leaks),
    }
    if group.is_main:
        files.write_result(result, facts)
        with working("writing the report", report):
            page = files.write_report(result, settings, trained, facts, group, report)
        result = replace(result, report=page)
    return result


def select_videos(settings: EvalSettings, trained: Trained, report: Report) -> Selection:
    """Opens the data and selects the videos of the subset. Raises DataError."""
    preprocessing, choice = trained.card.preprocessing, choose_split(settings, trained.card)
    source = open_dataset(
        settings.path_to_data or trained.card.settings.get("path_to_data"),
        report,
        clip=ClipFormat(
            preprocessing.n_frames,
            preprocessing.scale_to,
            preprocessing.frame_grid,
            preprocessing.clip_seconds,
        ),
        need_training=False,
        **choice,
    )
    trained = trained.named_by(source.layout.labels)
    labels = trained.card.labels
    source = replace(source, layout=match_labels(source.layout, labels))
    videos = source.layout.subset(settings.subset)
    if not videos:
        raise DataError(
            f"--subset {settings.subset}: the data has no such videos. "
            f"Hold groups out for it with --{settings.subset}-groups, or choose another --subset."
        )
    if unknown := sorted({video.label for video in videos} - set(labels)):
        raise DataError(
            f"{len(unknown)} classes of the data are unknown to the model ({shorten(unknown, most=12)}). "
            f"It has {len(labels)}: {shorten(labels, most=12)}."
            + (" Use data with all of its classes, or name them." if trained.labels_are_guessed else "")
        )
    return Selection(trained, source, choice, videos)


def results_folder(settings: EvalSettings, trained: Trained) -> Path:
    """Default folder of a model's results, named by the subset, the views, and data other than the model's own."""
    name, clips, crops = _subset_name(settings), settings.clips_per_video, settings.crops_per_clip
    if settings.shuffle_frames and settings.seed:
        name += f"-seed{settings.seed}"
    name += f"-{clips}x{crops}" if clips * crops > 1 else ""
    name += "-flip" if settings.flip else ""
    if settings.split not in (None, trained.card.settings.get("split")):
        name += f"-split{settings.split}"
    name += "-unreadable-wrong" if settings.unreadable == "wrong" else ""
    if settings.path_to_data is not None and trained.card.settings.get("path_to_data") is not None:
        root = find_data(settings.path_to_data)
        if not is_training_data(trained.card, root):
            name += f"-{data_name(video_root(root) or root)}"
    return trained.run / "eval" / name


def _subset_name(settings: EvalSettings) -> str:
    return settings.subset + ("-shuffled" if settings.shuffle_frames else "")


def _result(
    settings: EvalSettings, trained: Trained, videos: tuple[Video, ...], scores: Scores, seconds: float
) -> EvalResult:
    labels = trained.card.labels
    top_k = min(settings.top_k, len(labels))
    note = f"--top-k {settings.top_k}: the model has {len(labels)} classes, so top-{top_k} is shown."
    values = metrics.video_metrics(scores.logits, scores.labels, top_k=top_k)
    if scores.view_ranks.shape[1] > 1:
        for k in sorted({1, top_k}):
            values[f"clip_top{k}"] = (scores.view_ranks <= k).double().mean().item()
    rows = scores.logits.double().softmax(1)
    confidence, predicted = rows.max(1)
    right = predicted == scores.labels
    values["calibration_error"] = metrics.calibration_error(confidence, right)
    confusion = metrics.confusion_matrix(predicted, scores.labels, len(labels))
    answers = {
        index: VideoPrediction(videos[index], labels[int(row.argmax())], tuple(row.tolist()))
        for index, row in zip(scores.indices.tolist(), rows, strict=True)
    }
    unread = torch.zeros(len(labels), dtype=torch.long)
    if settings.unreadable == "wrong":
        for index, reason in scores.errors.items():
            unread[labels.index(videos[index].label)] += 1
            answers[index] = VideoPrediction(videos[index], error=reason)
        # Loss and calibration error remain those of the readable videos.
        share = values["videos"] / (values["videos"] + len(scores.errors))
        values |= {k: v * share for k, v in values.items() if k.startswith(("video_top", "clip_top"))}
        values["videos"] += len(scores.errors)
    table = metrics.class_table(confusion, unread)
    values |= {"mean_class_accuracy": metrics.mean_class_accuracy(table), "macro_f1": metrics.macro_f1(table)}
    values["unreadable"] = float(len(scores.errors))
    counted = tuple(answers[index] for index in sorted(answers))
    position = {label: number for number, label in enumerate(labels)}
    own = [position[answer.video.label] for answer in counted]
    outcomes = metrics.Outcomes(
        labels=own,
        predicted=[position[answer.predicted] if answer.predicted else None for answer in counted],
        in_top_k=[
            bool(answer.scores) and sum(s >= answer.scores[label] for s in answer.scores) <= top_k
            for answer, label in zip(counted, own, strict=True)
        ],
        confidence=[max(answer.scores, default=0.0) for answer in counted],
        groups=[answer.video.unit for answer in counted],
    )
    return EvalResult(
        metrics=values,
        intervals=metrics.metric_intervals(outcomes, top_k=top_k),
        per_class={label: row for label, row in zip(labels, table, strict=True) if row.videos},
        confused=tuple((labels[i], labels[j], count) for i, j, count in metrics.most_confused(confusion)),
        answers=counted,
        labels=labels,
        unreadable={videos[index].name: reason for index, reason in scores.errors.items()},
        seconds=seconds,
        subset=_subset_name(settings),
        model=trained.folder,
        name=trained.name,
        output=settings.output or results_folder(settings, trained),
        notes=(note,) if settings.top_k > top_k and "top_k" in settings.model_fields_set else (),
        calibration=tuple(metrics.calibration_bins(confidence, right)),
    )
