"""What an evaluation leaves to be looked at: its result, gathered for the report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvit_cli.engine.events import Report
from tvit_cli.engine.metrics import BINS
from tvit_cli.engine.pages import write_page
from tvit_cli.engine.place import Place
from tvit_cli.engine.resampling import RESAMPLES
from tvit_cli.engine.results import Answer, EvalResult, confusions
from tvit_cli.engine.trained import Trained
from tvit_cli.report.evaluation import EvaluationFacts, ShownVideo, write_evaluation_report
from tvit_cli.report.words import plural
from tvit_cli.settings.base import flag
from tvit_cli.settings.eval import EvalSettings

MOST_STRIPS = 12  # in each section: what a page weighs does not grow with the videos
MOST_LABELS = 3  # whose scores are told below a strip, and the video’s own


def write_report(
    result: EvalResult,
    settings: EvalSettings,
    trained: Trained,
    facts: Mapping[str, Any],
    place: Place,
    report: Report,
) -> Path | None:
    """Write report.html and plots/ beside metrics.json; returns the page’s path.

    `facts` are those of metrics.json. A page that cannot be written is a warning: the numbers are there.
    """
    labels = trained.card.labels
    wrong = sorted(
        (a for a in result.answers if a.scores and not a.is_right),
        key=lambda a: (-max(a.scores), a.video.name),
    )[:MOST_STRIPS]
    shown = {answer.video.name for answer in wrong}
    hard = sorted(
        (a for a in result.answers if a.scores and a.video.name not in shown),
        key=lambda a: (a.scores[labels.index(a.video.label)], a.video.name),
    )[:MOST_STRIPS]
    read = [answer for answer in result.answers if answer.scores]
    page = EvaluationFacts(
        folder=result.output,
        model=trained.name,
        subset=result.subset,
        labels=labels,
        metrics=result.metrics,
        intervals=result.intervals,
        draws=RESAMPLES,
        bins=BINS,
        groups=len({answer.video.unit for answer in result.answers}),
        seconds=result.seconds,
        per_class=result.per_class,
        counts=confusions(read),
        confused=result.confused,
        calibration=result.calibration,
        answers=[(max(answer.scores), answer.is_right) for answer in read],
        surely_wrong=shown_videos(result, wrong),
        hardest=shown_videos(result, hard),
        preprocessing=trained.card.preprocessing,
        measured=_measured(result, settings, trained, facts, place),
        unreadable=result.unreadable,
        warnings=result.warnings,
        commands=_commands(settings, result),
        device=trained.device,
    )
    return write_page(write_evaluation_report, page, report)


def shown_videos(result: EvalResult, answers: Sequence[Answer]) -> list[ShownVideo]:
    """Videos with their frames, those that can still be read."""
    assert result.seen is not None
    found = []
    for answer in answers:
        clip = result.seen.clip(answer.video.name)
        if clip is not None:
            own = answer.video.label
            found.append(
                ShownVideo(answer.video.name, own, answer.predicted, best_scores(answer, result.labels), clip)
            )
    return found


def best_scores(answer: Answer, labels: Sequence[str]) -> list[tuple[str, float]]:
    """The best labels with their scores, and the video’s own where it is not among them."""
    ordered = sorted(zip(labels, answer.scores, strict=True), key=lambda pair: -pair[1])
    return ordered[:MOST_LABELS] + [pair for pair in ordered[MOST_LABELS:] if pair[0] == answer.video.label]


def _measured(
    result: EvalResult, settings: EvalSettings, trained: Trained, facts: Mapping[str, Any], place: Place
) -> dict[str, str]:
    card, views = trained.card, facts["views"]
    size = card.preprocessing.frame_size
    base = "" if card.base is None else f", from {card.base.name}"
    looked = (
        f"{views['clips_per_video']} clips in time × {views['crops_per_clip']} crops"
        + (" × mirrored or not" if views["flip"] else "")
        + " of each video, scores averaged"
    )
    are_wrong = result.unreadable and settings.unreadable == "wrong"
    one = views == {"clips_per_video": 1, "crops_per_clip": 1, "flip": False}
    return {
        "model": f"{trained.folder}{base}",
        "weights": f"sha256 {card.weights_sha256[:16]}…, written by tvit {card.tvit_version}",
        "network": f"{sum(p.numel() for p in trained.model.parameters()):,} parameters, "
        f"{card.model.get('attention', '')} attention",
        "data": f"{facts['data']}, split {facts['split']}",
        "subset": f"{result.subset}: {result.metrics['videos']:.0f} videos, "
        f"{len({a.video.unit for a in result.answers})} groups",
        "left out": plural(len(result.unreadable), "video") + (", counted as wrong" if are_wrong else ""),
        "clip": f"{card.preprocessing.n_frames} frames of {size}×{size} pixels, one of each equal share of a video",
        "views": "one clip, the centre crop" if one else looked,
        "frames": f"from the {facts['frames']}",
        "order": "frames shuffled" if settings.shuffle_frames else "as filmed",
        "speed": f"{result.metrics['videos'] / result.seconds:.1f} videos/s, decoding included: {trained.device} × "
        f"{place.processes}, {settings.per_gpu_batch_size} clips at once",
    }


def _commands(settings: EvalSettings, result: EvalResult) -> list[tuple[str, str]]:
    model = shlex.quote(str(result.model))
    return [
        ("The same again", same_again(settings, ["--model", str(result.model)])),
        ("Label videos", f"tvit predict VIDEO --model {model}"),
        ("Where a label is seen", f"tvit predict VIDEO --model {model} --explain why.png"),
        ("Take the model elsewhere", f"tvit export {model} --format onnx"),
    ]


def same_again(settings: EvalSettings, models: Sequence[str]) -> str:
    """The command that gives the same evaluation of models, which are given as they are typed."""
    given = settings.model_dump(mode="json", exclude_defaults=True, exclude={"model", "compare"})
    words = ["tvit", "eval", *models]
    for name, value in given.items():
        words += [flag(name)] if value is True else [flag(name), str(value)]
    return shlex.join(words)
