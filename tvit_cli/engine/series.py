"""Several runs, one for each seed and split: scored in sequence, and what they come to together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvit_cli.engine.eval import evaluate
from tvit_cli.engine.events import Report, silent
from tvit_cli.engine.place import join_processes
from tvit_cli.model.folder import CARD_FILE
from tvit_cli.settings.eval import EvalSettings

SUMMARY_FILE = "summary.json"
MODEL_FOLDER = "model"  # of each run


@dataclass(frozen=True)
class SeriesResult:
    """Metrics of each run of a series (`seed0-split1` …), and mean and standard deviation of each metric.

    The deviation is that of a sample: divided by one less than the number of runs.
    """

    folder: Path
    runs: dict[str, dict[str, float]]
    summary: dict[str, tuple[float, float]]


def series_models(folder: Path | None) -> dict[str, Path]:
    """The model folders of a series by the names of its runs; none where `folder` is something else."""
    if folder is None or (folder / CARD_FILE).is_file() or (folder / MODEL_FOLDER).is_dir():
        return {}
    return {
        card.parents[1].name: card.parent for card in sorted(folder.glob(f"*/{MODEL_FOLDER}/{CARD_FILE}"))
    }


def evaluate_series(settings: EvalSettings, models: dict[str, Path], report: Report = silent) -> SeriesResult:
    """Score every model of a series as `evaluate` does, each on the data and split of its own training.

    The summary goes to eval/<subset>/summary.json in the series' folder, or to `--output`.
    """
    assert settings.model is not None
    place = join_processes(settings.device)
    runs = {}
    for name, model in models.items():
        output = None if settings.output is None else settings.output / name
        own = settings.model_copy(update={"model": model, "output": output})
        result = evaluate(own, report if place.is_main else silent, place)
        runs[name], subset = result.metrics, result.subset
    folder = settings.output or settings.model / "eval" / subset
    whole = SeriesResult(folder, runs, summarise(list(runs.values())))
    if place.is_main:
        write_summary(whole)
    return whole


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of the metrics that all runs have. 0.8, 0.9 -> (0.85, 0.0707…)"""
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    deviation: Callable[[list[float]], float] = statistics.stdev if len(runs) > 1 else lambda values: 0.0
    columns = {name: [run[name] for run in runs] for name in shared}
    return {name: (statistics.fmean(values), deviation(values)) for name, values in columns.items()}


def write_summary(result: SeriesResult) -> None:
    """Write summary.json to the series' folder: every run's metrics, their means and deviations."""
    content = {
        "runs": result.runs,
        "mean": {name: mean for name, (mean, _) in result.summary.items()},
        "sd": {name: sd for name, (_, sd) in result.summary.items()},
    }
    result.folder.mkdir(parents=True, exist_ok=True)
    (result.folder / SUMMARY_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
