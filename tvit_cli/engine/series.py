"""Several runs, one for each seed and split: scored in sequence, and what they come to together."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tvit_cli.engine.eval import evaluate
from tvit_cli.engine.evalreport import same_again
from tvit_cli.engine.events import Report, silent
from tvit_cli.engine.metrics import class_table, confusion_matrix, most_confused
from tvit_cli.engine.pages import write_page
from tvit_cli.engine.place import Place, join_processes
from tvit_cli.engine.results import EvalResult, confusions, results_in, write_json
from tvit_cli.engine.trained import is_of_series
from tvit_cli.model.folder import CARD_FILE, MODEL_FOLDER
from tvit_cli.report.series import SeriesFacts, write_series_report
from tvit_cli.settings.eval import EvalSettings

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class SeriesResult:
    """Metrics of each run of a series (`seed0-split1` …), and mean and standard deviation of each metric.

    The deviation is that of a sample: divided by one less than the number of runs. `report` is the page of
    an evaluation, where this process wrote one.
    """

    folder: Path
    runs: dict[str, dict[str, float]]
    summary: dict[str, tuple[float, float]]
    report: Path | None = None


def series_models(folder: Path | None) -> dict[str, Path]:
    """The model folders of a series by the names of its runs; none where `folder` is something else."""
    if folder is None or (folder / CARD_FILE).is_file() or (folder / MODEL_FOLDER).is_dir():
        return {}
    cards = sorted(folder.glob(f"*/{MODEL_FOLDER}/{CARD_FILE}"))
    return {card.parents[1].name: card.parent for card in cards if is_of_series(card.parents[1].name)}


def evaluate_series(settings: EvalSettings, models: dict[str, Path], report: Report = silent) -> SeriesResult:
    """Score every model of a series as `evaluate` does, each on the data and split of its own training.

    The summary goes to eval/<subset>/summary.json in the series' folder (eval/<subset>-<data> on other data), or to
    `--output`, with a page beside it.
    """
    assert settings.model is not None
    place = join_processes(settings.device)
    results = {}
    for name, model in models.items():
        output = None if settings.output is None else settings.output / name
        own = settings.model_copy(update={"model": model, "output": output})
        results[name] = evaluate(own, report if place.is_main else silent, place)
    runs = {name: result.metrics for name, result in results.items()}
    folder = settings.output or settings.model / "eval" / next(iter(results.values())).output.name
    whole = SeriesResult(folder, runs, summarise(list(runs.values())))
    if place.is_main:
        write_summary(whole)
        facts = _facts(whole, results, settings, place)
        whole = replace(whole, report=write_page(write_series_report, facts, report))
    return whole


def _facts(
    whole: SeriesResult, results: Mapping[str, EvalResult], settings: EvalSettings, place: Place
) -> SeriesFacts:
    """What the page of all runs together says."""
    labels = tuple(sorted({label for result in results.values() for label in result.labels}))
    answers = [answer for result in results.values() for answer in result.answers]
    position = {label: number for number, label in enumerate(labels)}
    read = [answer for answer in answers if answer.predicted]
    confusion = confusion_matrix(
        torch.tensor([position[answer.predicted] for answer in read]),
        torch.tensor([position[answer.video.label] for answer in read]),
        len(labels),
    )
    unread = Counter(answer.video.label for answer in answers if not answer.predicted)
    table = class_table(confusion, torch.tensor([unread[label] for label in labels]))
    found = {label: row for label, row in zip(labels, table, strict=True) if row.videos}
    first = next(iter(results.values()))
    notes = [note for result in results.values() for note in result.warnings]
    return SeriesFacts(
        folder=whole.folder,
        name=str(settings.model.absolute().name) if settings.model else "",
        subset=first.subset,
        labels=labels,
        runs=whole.runs,
        intervals={name: result.intervals for name, result in results.items()},
        summary=whole.summary,
        counts=confusions(read),
        confused=[(labels[true], labels[said], count) for true, said, count in most_confused(confusion)],
        per_class=found,
        outputs={name: str(result.report or result.output) for name, result in results.items()},
        warnings=list(dict.fromkeys(notes)),
        commands=[("The same again", same_again(settings, ["--model", str(settings.model)]))],
        device=place.device,
    )


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of the metrics that all runs have. 0.8, 0.9 -> (0.85, 0.0707…)"""
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    deviation: Callable[[list[float]], float] = statistics.stdev if len(runs) > 1 else lambda values: 0.0
    columns = {name: [run[name] for run in runs] for name in shared}
    return {name: (statistics.fmean(values), deviation(values)) for name, values in columns.items()}


def write_summary(result: SeriesResult) -> None:
    """Write summary.json to the series' folder: every run's metrics, their means and deviations.

    Raises RunError where it cannot be written.
    """
    content = {
        "runs": result.runs,
        "mean": {name: mean for name, (mean, _) in result.summary.items()},
        "sd": {name: sd for name, (_, sd) in result.summary.items()},
    }
    with results_in(result.folder) as folder:
        write_json(folder / SUMMARY_FILE, content)
