"""Comparison of two models on the same videos: differences, intervals, and changed predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvit_cli.engine.evaluate import Selection, evaluate, results_folder, select_videos
from tvit_cli.engine.evaluate.files import check_replaced, reproduce_command, write_json, write_page
from tvit_cli.engine.evaluate.metrics import difference_interval, mcnemar
from tvit_cli.engine.launch import join_process_group
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import RunError, SettingsError, plural
from tvit_cli.files import check_writable
from tvit_cli.report.comparison import write_comparison_report
from tvit_cli.report.html import Context
from tvit_cli.results import Comparison, EvalResult, Note, Pair, Report, once, silent
from tvit_cli.settings.eval import EvalSettings


def compare(settings: EvalSettings, report: Report = silent) -> Comparison:
    """Evaluates both models of `--compare` with the same settings, and compares their predictions.

    The comparison goes to eval/<subset>-vs-<first model> in the second model's run, or to `--output`; the models'
    results go to its subfolders A and B. Raises the errors of `evaluate`, and SettingsError if the models would not
    be scored on a common video, or with other labels; videos of one model only are reported and left out.
    """
    assert settings.compare is not None
    group = join_process_group(settings.device)
    report = once(report) if group.is_main else silent
    runs, precision = settings.working_directory, settings.mixed_precision
    models = [  # both are opened before the first is scored: errors come early
        open_trained(model, working_directory=runs, device=group.device, mixed_precision=precision)
        for model in settings.compare
    ]
    models[1] = models[1].spelt_as(models[0].card.labels)
    folder = results_folder(settings, models[1])
    output = settings.output or folder.with_name(f"{folder.name}-vs-{models[0].name.replace('/', '-')}")
    if group.is_main:
        check_writable("--output", output, output)
        check_replaced(output, "comparison.json", "p_value", ["comparison.html"], report)
    selections = _shared_videos([select_videos(settings, trained, report) for trained in models], report)
    first, second = (
        evaluate(
            settings.model_copy(update={"model": model, "output": output / letter, "compare": None}),
            report,
            group,
            selection,
        )
        for letter, model, selection in zip("AB", settings.compare, selections, strict=True)
    )
    pairs = _pairs(first, second)
    right = [(a.is_right, b.is_right) for a, b in pairs]
    comparison = Comparison(
        first,
        second,
        pairs,
        difference_interval([a for a, _ in right], [b for _, b in right], [a.video.unit for a, _ in pairs]),
        p_value=mcnemar(right.count((True, False)), right.count((False, True))),
        output=output,
    )
    if not group.is_main:
        return comparison
    write_json(comparison.output / "comparison.json", _content(comparison))
    again = reproduce_command(settings, ["--compare", str(first.model), str(second.model)])
    context = Context(_setup(comparison), [("Repeat this comparison", again)], group.device)
    page = write_page(comparison.output, lambda: write_comparison_report(comparison, context), report)
    return replace(comparison, report=page)


def _shared_videos(selections: Sequence[Selection], report: Report) -> list[Selection]:
    """The selections with the videos that both have; others are reported. Raises SettingsError without any."""
    first, second = selections
    labels = {video.path: video.label for video in second.videos}
    shared = [video for video in first.videos if video.path in labels]
    problem = "" if shared else "the models are not scored on the same videos"
    for video in shared:
        if video.label != labels[video.path]:
            problem = f"{video.label} for the first model and {labels[video.path]} for the second"
            problem = f"{video.name} has the label {problem}"
            break
    if problem:
        models = f"--compare {first.trained.folder} {second.trained.folder}"
        raise SettingsError(f"{models}: {problem}. Name the data for both with --path-to-data.")
    paths = {video.path for video in shared}
    a, b = (len(selection.videos) - len(paths) for selection in selections)
    if a or b:
        count = plural(len(paths), "video")
        text = (
            f"Compared on the {count} that both models have; {a} of the first and {b} of the second left out."
        )
        report(Note(text, "warning"))
    return [replace(s, videos=tuple(v for v in s.videos if v.path in paths)) for s in selections]


def _pairs(first: EvalResult, second: EvalResult) -> tuple[Pair, ...]:
    others = {answer.video.path: answer for answer in second.answers}
    pairs = tuple((a, others[a.video.path]) for a in first.answers if a.video.path in others)
    if not pairs:
        models = f"--compare {first.model} {second.model}"
        raise RunError(f"{models}: no video could be read for both models. Check the videos.")
    return pairs


def _content(comparison: Comparison) -> dict[str, object]:
    def flips(pairs: tuple[Pair, ...]) -> list[dict[str, str]]:
        return [
            {"video": a.video.name, "label": a.video.label, "first": a.predicted, "second": b.predicted}
            for a, b in pairs
        ]

    return {
        "first": str(comparison.first.model),
        "second": str(comparison.second.model),
        "videos": comparison.videos,
        "difference": comparison.difference,
        "interval": comparison.interval,
        "p_value": comparison.p_value,
        "gained": flips(comparison.gained),
        "lost": flips(comparison.lost),
    }


def _setup(comparison: Comparison) -> dict[str, str]:
    first, second, pairs = comparison.first, comparison.second, comparison.pairs
    unread = sum(bool(a.error or b.error) for a, b in pairs)
    which = f", of which {unread} could not be read and count as wrong" if unread else " that both could read"
    groups = len({a.video.unit for a, _ in pairs})
    speeds = (f"{r.metrics['videos'] / r.seconds:.1f} videos/s" for r in (first, second))
    one, two = comparison.names
    return {
        one: str(first.model),
        two: str(second.model),
        "videos": f"{len(pairs)}{which}, of {groups} groups; clips are shown as {two} received them",
        "speed": "{} and {}, decoding included".format(*speeds),
    }
