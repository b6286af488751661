"""Comparison of two models on the same videos: differences, intervals, and changed predictions."""

from __future__ import annotations

from dataclasses import replace

from tvit_cli.engine.evaluate import check_results_folder, evaluate, results_folder
from tvit_cli.engine.evaluate.files import (
    MOST_STRIPS,
    output_folder,
    reproduce_command,
    write_json,
    write_page,
)
from tvit_cli.engine.evaluate.metrics import difference_interval, mcnemar
from tvit_cli.engine.launch import ProcessGroup, join_process_group
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import SettingsError
from tvit_cli.report.comparison import ComparisonFacts, Flip, write_comparison_report
from tvit_cli.results import RESAMPLES, Comparison, EvalResult, Pair, Report, VideoPrediction, silent
from tvit_cli.settings.eval import EvalSettings

COMPARISON_FILE = "comparison.json"


def compare(settings: EvalSettings, report: Report = silent) -> Comparison:
    """Score both models of `--compare` with all other settings the same, and set them side by side.

    Each leaves its own results where its own evaluation would, and the comparison goes beside the second's; in
    `--output`, or where both would use the same folder, they have folders A and B in it, and the comparison goes
    beside those. Raises what `evaluate` raises, and SettingsError where the two were not scored on the same
    videos, or those have another class for one than for the other.
    """
    assert settings.compare is not None
    place = join_process_group(settings.device)
    models = [  # the second is missed before the first is scored
        open_trained(
            model,
            working_directory=settings.working_directory,
            device=place.device,
            mixed_precision=settings.mixed_precision,
        )
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
        if place.is_main:
            check_results_folder(each[-1], trained)
    first, second = (evaluate(own, report, place, trained) for own, trained in zip(each, models, strict=True))
    pairs = _pairs(first, second)
    comparison = Comparison(
        first=first,
        second=second,
        pairs=pairs,
        interval=difference_interval(
            [a.is_right for a, _ in pairs], [b.is_right for _, b in pairs], [a.video.unit for a, _ in pairs]
        ),
        p_value=1.0,
        output=shared or second.output,
    )
    lost, gained = len(comparison.lost), len(comparison.gained)
    comparison = replace(comparison, p_value=mcnemar(lost, gained))
    if place.is_main:
        _write(comparison)
        facts = _facts(comparison, settings, place)
        comparison = replace(comparison, report=write_page(write_comparison_report, facts, report))
    return comparison


def _names(first: EvalResult, second: EvalResult) -> tuple[str, str]:
    """What the models are called; by their paths where that is the same."""
    if first.name != second.name:
        return first.name, second.name
    return str(first.model), str(second.model)


def _pairs(first: EvalResult, second: EvalResult) -> tuple[Pair, ...]:
    others = {answer.video.path: answer for answer in second.answers}
    pairs = tuple((a, others[a.video.path]) for a in first.answers if a.video.path in others)
    models = f"--compare {first.model} {second.model}"
    if not pairs:
        raise SettingsError(
            f"{models}: they were not scored on the same videos. Name the data for both with --path-to-data."
        )
    for a, b in pairs:
        if a.video.label != b.video.label:
            raise SettingsError(
                f"{models}: {a.video.name} is of the class {a.video.label} for the first and {b.video.label} for "
                "the second. Name the data for both with --path-to-data."
            )
    return pairs


def _write(comparison: Comparison) -> None:
    def flips(pairs: tuple[Pair, ...]) -> list[dict[str, str]]:
        return [
            {"video": a.video.name, "label": a.video.label, "first": a.predicted, "second": b.predicted}
            for a, b in pairs
        ]

    content = {
        "first": str(comparison.first.model),
        "second": str(comparison.second.model),
        "videos": comparison.videos,
        "difference": comparison.difference,
        "interval": comparison.interval,
        "p_value": comparison.p_value,
        "gained": flips(comparison.gained),
        "lost": flips(comparison.lost),
    }
    with output_folder(comparison.output) as folder:
        write_json(folder / COMPARISON_FILE, content)


def _facts(
    comparison: Comparison,
    settings: EvalSettings,
    place: ProcessGroup,
) -> ComparisonFacts:
    """What the page of a comparison says."""
    first, second, pairs = comparison.first, comparison.second, comparison.pairs
    assert second.clips is not None
    counts: dict[str, list[int]] = {}
    for a, b in pairs:
        own = counts.setdefault(a.video.label, [0, 0, 0])
        own[:] = own[0] + 1, own[1] + a.is_right, own[2] + b.is_right
    both = sum(a.is_right and b.is_right for a, b in pairs)
    gained, lost = len(comparison.gained), len(comparison.lost)
    groups = len({a.video.unit for a, _ in pairs})
    names = _names(first, second)
    return ComparisonFacts(
        folder=comparison.output,
        first=names[0],
        second=names[1],
        subset=second.subset,
        metrics=(first.metrics, second.metrics),
        difference=comparison.difference,
        interval=comparison.interval,
        draws=RESAMPLES,
        p_value=comparison.p_value,
        both=both,
        only_first=lost,
        only_second=gained,
        neither=len(pairs) - both - gained - lost,
        per_class={label: (n, a, b) for label, (n, a, b) in counts.items()},
        gained=_flips(comparison.gained, second),
        lost=_flips(comparison.lost, second),
        preprocessing=second.clips.preprocessing,
        measured={
            "first": str(first.model),
            "second": str(second.model),
            "videos": f"{_which(pairs)}, of {groups} groups; strips show what the second saw",
            "speed": f"first {first.metrics['videos'] / first.seconds:.1f} videos/s, "
            f"second {second.metrics['videos'] / second.seconds:.1f} videos/s, decoding included",
        },
        warnings=_warnings(first, second),
        commands=[
            (
                "The same again",
                reproduce_command(settings, ["--compare", str(first.model), str(second.model)]),
            )
        ],
        device=place.device,
    )


def _warnings(first: EvalResult, second: EvalResult) -> list[str]:
    """What is true of both models, then what is true of one."""
    both = [warning for warning in first.warnings if warning in second.warnings]
    one = [
        f"{which}: {warning}"
        for which, result in (("First", first), ("Second", second))
        for warning in result.warnings
        if warning not in both
    ]
    return both + one


def _which(pairs: tuple[Pair, ...]) -> str:
    """How many videos are compared, and how many of them count as wrong because they could not be read."""
    unread = sum(bool(a.error or b.error) for a, b in pairs)
    if not unread:
        return f"{len(pairs)} that both could read"
    return f"{len(pairs)}, of which {unread} could not be read and count as wrong"


def _flips(pairs: tuple[Pair, ...], second: EvalResult) -> list[Flip]:
    """The flips of which the two models are surest, with what the second saw."""
    assert second.clips is not None
    surest = sorted(pairs, key=lambda pair: -_score(pair[0]) - _score(pair[1]))[:MOST_STRIPS]
    found = []
    for a, b in surest:
        clip = second.clips.clip(b.video.name)
        if clip is not None:
            said = [(answer.predicted or "unreadable", _score(answer)) for answer in (a, b)]
            found.append(Flip(b.video.name, b.video.label, said[0], said[1], clip))
    return found


def _score(answer: VideoPrediction) -> float:
    return max(answer.scores, default=0.0)
