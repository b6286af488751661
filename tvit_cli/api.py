"""The Python API: a function per verb, with settings as keyword arguments and results as dataclasses.

The command line calls the same `run_…` functions and prints their results.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tvit_cli.console import Console
from tvit_cli.errors import SettingsError
from tvit_cli.results import Report
from tvit_cli.settings.base import Layer, Loaded, Settings, extra, load
from tvit_cli.settings.download import DownloadSettings
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.export import ExportSettings
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.predict import PredictSettings
from tvit_cli.settings.train import TrainSettings

if TYPE_CHECKING:
    from tvit_cli.engine.download import DownloadResult
    from tvit_cli.engine.export import ExportResult
    from tvit_cli.engine.predict import PredictResult, TimelineResult
    from tvit_cli.results import (
        Comparison,
        DryRun,
        EvalResult,
        ExtractResult,
        Scan,
        SeriesResult,
        StreamResult,
        TrainResult,
    )

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
S = TypeVar("S", bound=Settings)

MODELS: dict[str, type[Settings]] = {
    "download": DownloadSettings,
    "extract": ExtractSettings,
    "train": TrainSettings,
    "evaluate": EvalSettings,
    "predict": PredictSettings,
    "export": ExportSettings,
}


def _documented(function: F) -> F:
    """Adds the verb's settings to a function's signature and docstring, for `help` and completion."""
    own = inspect.signature(function, eval_str=False)
    fields = {
        key: field
        for key, field in MODELS[function.__name__].model_fields.items()
        if not extra(field).get("printed") and key not in own.parameters
    }
    common = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    settings = [
        keyword(key, default=field.get_default(call_default_factory=True, validated_data={}))
        for key, field in fields.items()
    ]
    function.__signature__ = own.replace(parameters=[*common, *settings])  # type: ignore[attr-defined]
    lines = (f"    {key}: {field.description}." for key, field in fields.items())
    function.__doc__ = "\n".join([f"{inspect.getdoc(function)}", "", "Settings:", *lines])
    return function


@_documented
def download(
    name: str,
    *,
    on_event: Report | None = None,
    quiet: bool = False,
    config: str | Path | None = None,
    **settings: Any,
) -> DownloadResult:
    """Fetches or generates a known data set; a repeated call fetches missing files only.

    `on_event` gets the events (see `tvit_cli.Event`) in place of the progress display, `quiet` shows warnings only,
    `config` is a settings file. Differences found by `verify` are in the result. Raises TvitError.
    """
    return _call(run_download, {"name": name, **settings}, DownloadSettings, on_event, quiet, config)


@_documented
def extract(
    *, on_event: Report | None = None, quiet: bool = False, config: str | Path | None = None, **settings: Any
) -> ExtractResult | tuple[Scan, ...]:
    """Decodes videos once into a frame store; with `check`, returns the properties of each video instead.

    `on_event`, `quiet` and `config` are those of `download`. Raises TvitError.
    """
    return _call(run_extract, settings, ExtractSettings, on_event, quiet, config)


@_documented
def train(
    *,
    on_event: Report | None = None,
    quiet: bool = False,
    config: str | Path | None = None,
    preset: str | None = None,
    **settings: Any,
) -> TrainResult | SeriesResult | DryRun:
    """Trains a model; several seeds or splits (`seed=[0, 1]`) give a SeriesResult, `dry_run` a DryRun.

    `on_event`, `quiet` and `config` are those of `download`, `preset` names shipped settings. Ctrl-C, and a
    KeyboardInterrupt raised by `on_event`, stop after the step: the run is saved, and Interrupted says how to
    resume. Random state of torch is restored. Raises TvitError.
    """
    return _call(run_train, settings, TrainSettings, on_event, quiet, config, preset)


@_documented
def evaluate(
    model: str | Path | None = None,
    *,
    on_event: Report | None = None,
    quiet: bool = False,
    config: str | Path | None = None,
    **settings: Any,
) -> EvalResult | SeriesResult | Comparison:
    """Scores a model (default: the newest) on a subset; a series gives a SeriesResult, `compare` a Comparison.

    `on_event`, `quiet` and `config` are those of `download`. Raises TvitError.
    """
    settings |= {} if model is None else {"model": model}
    return _call(run_evaluate, settings, EvalSettings, on_event, quiet, config)


@_documented
def predict(
    paths: str | Path | Sequence[str | Path],
    *,
    on_event: Report | None = None,
    quiet: bool = False,
    config: str | Path | None = None,
    **settings: Any,
) -> PredictResult | tuple[TimelineResult, ...] | StreamResult:
    """Labels videos with a model (default: the newest); with `window`, returns a timeline of each.

    The windows of a live source come to `on_event` as they end (`WindowPrediction`).

    Opens the model at each call; `load_model` opens it once, and takes frames. `on_event`, `quiet` and `config` are
    those of `download`. Raises TvitError; an unreadable video has its `error` in the result.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if others := [type(path).__name__ for path in several if not isinstance(path, str | os.PathLike)]:
        advice = "Frames are labelled by tvit_cli.load_model(…).predict(frames)."
        raise SettingsError(
            f"paths: {others[0]}: it should be the name of a video, a folder or a URL. {advice}"
        )
    return _call(run_predict, {"paths": several, **settings}, PredictSettings, on_event, quiet, config)


@_documented
def export(
    model: str | Path | None = None,
    *,
    on_event: Report | None = None,
    quiet: bool = False,
    config: str | Path | None = None,
    **settings: Any,
) -> ExportResult:
    """Writes a model (default: the newest) in another format, and compares it with the model.

    `on_event`, `quiet` and `config` are those of `download`. Raises TvitError.
    """
    settings |= {} if model is None else {"model": model}
    return _call(run_export, settings, ExportSettings, on_event, quiet, config)


def _call(
    run: Callable[[Loaded[S], Report], R],
    given: dict[str, Any],
    model: type[S],
    on_event: Report | None,
    quiet: bool,
    config: str | Path | None,
    preset: str | None = None,
) -> R:
    printed = [
        key for key in given if key in model.model_fields and extra(model.model_fields[key]).get("printed")
    ]
    if printed:
        raise SettingsError(f"{printed[0]}: changes the output of the command line only. Leave it out.")
    arguments = {key: _plain(value, is_series=key in model.SERIES) for key, value in given.items()}
    file = None if config is None else Path(config)
    how: Any = {"config": file, "preset": preset, "verbs": MODELS.values(), "beneath": settings_beneath}
    loaded = load(model, arguments=arguments, **how)
    count = getattr(loaded.settings, "num_processes", 1)
    if count > 1 and "WORLD_SIZE" not in os.environ:
        raise SettingsError(
            f"num_processes: {count}: a call from Python runs in its own process. Start the script with "
            f"torchrun --nproc-per-node {count}, or take --num-processes {count} of the command line."
        )
    if on_event is not None:
        return run(loaded, on_event)
    return Console("quiet" if quiet else "normal").run(run, loaded)


def _plain(value: Any, *, is_series: bool) -> Any:
    """A setting as pydantic reads it: paths as text, NumPy's numbers as Python's, series as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_series and isinstance(value, tuple | range):
        value = list(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def run_download(loaded: Loaded[DownloadSettings], report: Report) -> DownloadResult:
    """Fetches, generates, verifies or repairs a data set."""
    from tvit_cli.engine.dataset import make_demo_data
    from tvit_cli.engine.download import download

    makers = {"motions": lambda folder: make_demo_data(folder, report)}
    return download(loaded.settings, makers=makers, report=report)


def run_extract(loaded: Loaded[ExtractSettings], report: Report) -> ExtractResult | tuple[Scan, ...]:
    """Writes a frame store, or checks the videos."""
    from tvit_cli.engine import extract
    from tvit_cli.results import silent

    if loaded.settings.check:
        return extract.check(loaded.settings, report)
    rank, processes, wait = extract.process_group()
    report = report if rank == 0 else silent
    return extract.extract(loaded.settings, report, rank=rank, processes=processes, wait_for_all=wait)


def settings_beneath(named: Loaded[TrainSettings]) -> Layer | None:
    """Settings of an earlier run or of video weights beneath a training's. See `engine.train.origin`."""
    settings = named.settings
    has_weights = settings.hf_model_name is not None and named.origins["hf_model_name"] != "default"
    if not has_weights and settings.from_ is None and settings.resume_from_checkpoint is None:
        return None
    from tvit_cli.engine.train import origin

    return origin.settings_beneath(named)


def run_train(loaded: Loaded[TrainSettings], report: Report) -> TrainResult | SeriesResult | DryRun:
    """Trains one model or a series, or measures the cost of a training."""
    import torch

    from tvit_cli.engine.launch import exit_with_launcher
    from tvit_cli.engine.train import train
    from tvit_cli.engine.train.dryrun import dry_run
    from tvit_cli.engine.train.sweep import train_series

    exit_with_launcher()
    gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(gpus)):  # the caller's random numbers are not changed
        if loaded.settings.dry_run:
            return dry_run(loaded.settings, report)
        if len(loaded.series) > 1:
            return train_series(loaded.series, report)
        return train(loaded.settings, report)


def run_evaluate(loaded: Loaded[EvalSettings], report: Report) -> EvalResult | SeriesResult | Comparison:
    """Scores a model or a series, or compares two models."""
    from tvit_cli.engine.evaluate import evaluate
    from tvit_cli.engine.evaluate.compare import compare
    from tvit_cli.engine.train.sweep import evaluate_series
    from tvit_cli.engine.trained import series_models

    settings = loaded.settings
    if settings.compare is not None:
        return compare(settings, report)
    if models := series_models(settings.model):
        return evaluate_series(settings, models, report)
    return evaluate(settings, report)


def run_predict(
    loaded: Loaded[PredictSettings], report: Report
) -> PredictResult | tuple[TimelineResult, ...] | StreamResult:
    """Labels videos, or makes a timeline of each, or labels the windows of a live source."""
    from tvit_cli.engine.predict import find_stream, predict, predict_stream, predict_timelines

    if (source := find_stream(loaded.settings)) is not None:
        return predict_stream(loaded.settings, source, report)
    return (predict if loaded.settings.window is None else predict_timelines)(loaded.settings, report)


def run_export(loaded: Loaded[ExportSettings], report: Report) -> ExportResult:
    """Writes an export."""
    from tvit_cli.engine.export import export

    return export(loaded.settings, report)
