"""Comparison of two models on the same videos: differences, intervals, and changed predictions."""

from __future__ import annotations

from dataclasses import replace

from tvit_cli.engine.evaluate import check_results_folder, evaluate, results_folder
from tvit_cli.engine.evaluate.files import reproduce_command, write_json, write_page
from tvit_cli.engine.evaluate.metrics import difference_interval, mcnemar
from tvit_cli.engine.launch import join_process_group
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import SettingsError
from tvit_cli.report.comparison import write_comparison_report
from tvit_cli.report.html import Context
from tvit_cli.results import Comparison, EvalResult, Pair, Report, silent
from tvit_cli.settings.eval import EvalSettings


def compare(settings: EvalSettings, report: Report = silent) -> Comparison:
    """Evaluates both models of `--compare` with the same settings, and compares their predictions.

    Each model's results go where its own evaluation puts them, the comparison beside the second's. With `--output`,
    or if both have the same folder, they go to its subfolders A and B, and the comparison beside those. Raises the
    errors of `evaluate`, and SettingsError if the models were not scored on the same videos and labels.
    """
    assert settings.compare is not None
    group = join_process_group(settings.device)
    runs, precision = settings.working_directory, settings.mixed_precision
    models = [  # both are opened before the first is scored: errors come early
        open_trained(model, working_directory=runs, device=group.device, mixed_precision=precision)
        for model in settings.compare
    ]
    models[1] = models[1].spelt_as(models[0].card.labels)
    folders = [results_folder(settings, trained) for trained in models]
    shared = settings.output
    if shared is None and folders[0].resolve() == folders[1].resolve():
        shared = folders[0]
    each = []
    for letter, model, trained in zip("AB", settings.compare, models, strict=True):
        output = None if shared is None else shared / letter
        each.append(settings.model_copy(update={"model": model, "output": output, "compare": None}))
        if group.is_main:
            check_results_folder(each[-1], trained)
    first, second = (evaluate(own, report, group, trained) for own, trained in zip(each, models, strict=True))
    pairs = _pairs(first, second)
    right = [(a.is_right, b.is_right) for a, b in pairs]
    comparison = Comparison(
        first,
        second,
        pairs,
        difference_interval([a for a, _ in right], [b for _, b in right], [a.video.unit for a, _ in pairs]),
        p_value=mcnemar(right.count((True, False)), right.count((False, True))),
        output=shared or second.output,
    )
    if not group.is_main:
        return comparison
    write_json(comparison.output / "comparison.json", _content(comparison))
    again = reproduce_command(settings, ["--compare", str(first.model), str(second.model)])
    context = Context(_setup(comparison), [("Repeat this comparison", again)], group.device)
    page = write_page(comparison.output, lambda: write_comparison_report(comparison, context), report)
    return replace(comparison, report=page)


def _pairs(first: EvalResult, second: EvalResult) -> tuple[Pair, ...]:
    others = {answer.video.path: answer for answer in second.answers}
    pairs = tuple((a, others[a.video.path]) for a in first.answers if a.video.path in others)
    problems = [] if pairs else ["the models were not scored on the same videos"]
    for a, b in pairs:
        if a.video.label != b.video.label:
            labels = f"{a.video.label} for the first model and {b.video.label} for the second"
            problems.append(f"{a.video.name} has the label {labels}")
    if problems:
        models = f"--compare {first.model} {second.model}"
        raise SettingsError(f"{models}: {problems[0]}. Name the data for both with --path-to-data.")
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
    return {
        "first": str(first.model),
        "second": str(second.model),
        "videos": f"{len(pairs)}{which}, of {groups} groups; clips are shown as the second model received them",
        "speed": "first {}, second {}, decoding included".format(*speeds),
    }
