"""The verbs: settings in, engine called, result shown. Heavy imports wait until a verb runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from tvit_cli.errors import DataError, RunError

if TYPE_CHECKING:
    from tvit_cli.console import Console, Verbosity
    from tvit_cli.engine.predict import Prediction
    from tvit_cli.results import CheckResult, DryRun, SeriesResult
    from tvit_cli.settings.base import Loaded
    from tvit_cli.settings.download import DownloadSettings
    from tvit_cli.settings.eval import EvalSettings
    from tvit_cli.settings.export import ExportSettings
    from tvit_cli.settings.extract import ExtractSettings
    from tvit_cli.settings.predict import PredictSettings
    from tvit_cli.settings.train import TrainSettings


def download(loaded: Loaded[DownloadSettings], verbosity: Verbosity) -> None:
    """Fetch, verify or repair a data set, or list the known ones."""
    from tvit_cli.console import Console, size
    from tvit_cli.engine import download as engine
    from tvit_cli.engine.dataset import make_demo_data

    settings = loaded.settings
    console = Console(verbosity)
    if settings.list_sets:
        rows = [
            (d.name, d.classes, f"{d.clips:,}", size(d.bytes), d.licence, d.title)
            for d in engine.known_datasets()
        ]
        console.table(["name", "classes", "clips", "download", "licence", "what"], rows)
        return
    with console:
        result = engine.download(
            settings,
            makers={"motions": lambda folder: make_demo_data(folder, console.report)},
            report=console.report,
        )
    for difference in result.differences:
        console.warn(f"{difference.path}: {difference.kind}: {difference.detail}")
    if result.differences:
        raise RunError(
            f"{len(result.differences)} files of {result.folder} are not as they were fetched. "
            f"Mend them: tvit download {result.name} --repair"
        )
    console.say(
        f"{result.folder}: {result.videos:,} videos of {result.classes} classes; "
        f"{result.new_files:,} files are new, {size(result.bytes_received)} were fetched."
    )


def extract(loaded: Loaded[ExtractSettings], verbosity: Verbosity) -> None:
    """Make a frame store and say what it holds, or show what `--check` found."""
    from tvit_cli.console import Console
    from tvit_cli.engine import extract as engine
    from tvit_cli.results import silent

    settings = loaded.settings
    with Console(verbosity) as console:
        if settings.check:
            found = engine.check(settings, console.report)
        else:
            rank, processes, wait = engine.process_group()
            result = engine.extract(
                settings,
                console.report if rank == 0 else silent,
                rank=rank,
                processes=processes,
                wait_for_all=wait,
            )
    if settings.check:
        _show_check(console, found, as_json=settings.json_lines)
        return
    console.say(
        f"{result.videos} videos extracted ({result.bytes / 1e6:.1f} MB, {result.seconds:.1f} s), "
        f"{result.skipped} were there already, {len(result.unreadable)} cannot be read."
    )
    console.say(f"Frame store: {result.folder}")


def _show_check(console: Console, found: CheckResult, *, as_json: bool) -> None:
    if as_json:
        for scan in found.scans:
            console.json_line({**asdict(scan), "path": str(scan.path)})
    else:
        rows = [
            (
                scan.path,
                scan.codec,
                f"{scan.width}x{scan.height}" if scan.is_readable else "",
                scan.frames,
                f"{scan.seconds:.2f}",
                f"{scan.rate:.2f}" if scan.rate else "",
                scan.rotation,
                scan.problem,
            )
            for scan in found.scans
        ]
        console.table(["video", "codec", "size", "frames", "seconds", "rate", "rotation", "problem"], rows)
    if bad := found.unreadable:
        raise RunError(f"{len(bad)} of {len(found.scans)} videos cannot be read.")
    if not as_json:
        console.say(f"{len(found.scans)} of {len(found.scans)} videos can be read.")


def train(loaded: Loaded[TrainSettings], verbosity: Verbosity) -> None:
    """Train a model and say where it is and what to type next."""
    from tvit_cli.console import Console

    if loaded.settings.resume_from_checkpoint is not None and len(loaded.series) == 1:
        from tvit_cli.engine.train.run_folder import find_run, saved_settings

        loaded = loaded.over(saved_settings(find_run(loaded.settings)))
    if loaded.settings.show_settings:
        series = [settings.model_dump(mode="json", exclude={"show_settings"}) for settings in loaded.series]
        rows = [
            (name, ",".join(dict.fromkeys(json.dumps(s[name]) for s in series)), loaded.origins[name])
            for name in series[0]
        ]
        Console(verbosity).table(["setting", "value", "from"], rows)
        return
    from tvit_cli.engine import train as engine
    from tvit_cli.engine.launch import exit_with_launcher
    from tvit_cli.engine.train.dryrun import dry_run

    if _several_processes(loaded.settings.num_processes, resumes=True):
        return
    exit_with_launcher()
    if len(loaded.series) > 1 and not loaded.settings.dry_run:
        _train_series(loaded, verbosity)
        return
    if loaded.settings.dry_run:
        with Console(verbosity) as console:
            plan = dry_run(loaded.settings, console.report)
        _show_plan(console, plan)
        return
    with Console(verbosity) as console:
        result = engine.train(loaded.settings, console.report)
    if result.best:
        console.say(
            f"Best epoch {result.best_epoch}: validation top-1 {result.best['val_video_top1']:.3f} "
            f"(loss {result.best['val_loss']:.3f})."
        )
    if result.test is not None:
        m = result.test.metrics
        console.say(f"Test top-1 {m['video_top1']:.3f} on {m['videos']:.0f} videos that training never saw.")
    if result.report is not None:
        console.say(f"Report: {result.report}")
    console.next_steps(
        result.model, [f"tvit predict VIDEO --model {result.model}", f"tvit eval --model {result.model}"]
    )


def _show_plan(console: Console, plan: DryRun) -> None:
    from tvit_cli.console import duration, size

    memory, clips = plan.memory, plan.micro_batch
    terms = ("weights", "gradients", "moments", "average", "workspace")
    parts = [f"{name} {size(getattr(memory, name))}" for name in terms if getattr(memory, name)]
    parts.append(f"{clips} clips × {size(memory.activations_per_clip)}")
    per_step = plan.pass_flops * plan.clips_per_step
    rows = [
        ("run", plan.folder),
        ("data", plan.data),
        ("model", plan.model),
        ("parameters", f"{plan.parameters:,}, {plan.trainable:,} of them trained"),
        ("device", f"{plan.device}, {plan.precision} mixed precision"),
        ("batch", plan.batch),
        ("steps", f"{plan.epochs} epochs of {plan.steps_per_epoch}"),
        ("evaluated clip", f"{plan.forward_flops / 1e9:,.2f} GFLOP, forward"),
        (
            "trained clip",
            f"{plan.pass_flops / 1e9:,.2f} GFLOP, forward and backward; {per_step / 1e12:,.3f} TFLOP per step",
        ),
        ("memory", f"{size(memory.needed(clips))} of {size(plan.available)}: {' + '.join(parts)}"),
        ("step", f"{plan.seconds_per_step:.3g} s, {plan.data_wait:.0%} of it waiting for data"),
        ("validation", duration(plan.validation_seconds)),
        ("epoch", duration(plan.seconds_per_epoch)),
        ("all epochs", duration(plan.epochs * plan.seconds_per_epoch)),
    ]
    console.table(["what", "measured in a dry run"], rows)
    if memory.needed(clips) > plan.available:
        console.warn("This is more memory than there is. Take --per-gpu-batch-size auto.")


def _several_processes(count: int, *, resumes: bool) -> bool:
    """Run this command in that many processes where it is not one of them; whether that was done."""
    from tvit_cli.engine.launch import is_launched, run_local_processes

    if count == 1 or is_launched():
        return False
    if code := run_local_processes(count, sys.argv[1:], resumes=resumes):
        sys.exit(code)
    return True


def _train_series(loaded: Loaded[TrainSettings], verbosity: Verbosity) -> None:
    """Train once for each seed and split, and say how far the results lie apart."""
    from tvit_cli.console import Console
    from tvit_cli.engine.train.sweep import train_series

    with Console(verbosity) as console:
        result = train_series(loaded.series, console.report)
    _show_series(console, result, ("val_video_top1", "val_loss", "test_video_top1"))


def _show_series(console: Console, result: SeriesResult, metrics: tuple[str, ...]) -> None:
    names = [name for name in metrics if name in result.summary]
    rows = [(run, *(f"{found[name]:.3f}" for name in names)) for run, found in result.runs.items()]
    rows.append(("mean ± sd", *("{:.3f} ± {:.3f}".format(*result.summary[name]) for name in names)))
    console.table(["run", *(name.replace("_", " ") for name in names)], rows)
    console.say(f"\nWritten to {result.folder}")
    if result.report is not None:
        console.say(f"Report: {result.report}")


def evaluate(loaded: Loaded[EvalSettings], verbosity: Verbosity) -> None:
    """Score a model and show its metrics, overall and per class; or set two side by side."""
    from tvit_cli.console import Console
    from tvit_cli.engine import evaluate as engine
    from tvit_cli.engine.train.sweep import evaluate_series, series_models

    if _several_processes(loaded.settings.num_processes, resumes=False):
        return
    if loaded.settings.compare is not None:
        _compare(loaded.settings, verbosity)
        return
    if models := series_models(loaded.settings.model):
        with Console(verbosity) as console:
            series = evaluate_series(loaded.settings, models, console.report)
        _show_series(console, series, tuple(name for name in series.summary if name != "unreadable"))
        return
    with Console(verbosity) as console:
        result = engine.evaluate(loaded.settings, console.report)
    for note in result.notes:
        console.warn(note)
    rows = [
        (label, c.videos, f"{c.recall:.3f}", f"{c.precision:.3f}", f"{c.f1:.3f}")
        for label, c in sorted(result.per_class.items())
    ]
    console.table(["class", "videos", "top-1", "precision", "F1"], rows)
    if result.confused:
        console.say("")
        console.table(["most confused", "taken for", "videos"], result.confused)
    console.say("")
    counts = ("videos", "unreadable")
    metrics = [
        (name, f"{v:.0f}" if name in counts else f"{v:.4f}", _interval(result.intervals.get(name)))
        for name, v in result.metrics.items()
    ]
    console.table(["metric", result.subset, "95 % interval"], metrics)
    speed = result.metrics["videos"] / result.seconds
    console.say(f"\n{result.seconds:.1f} s, {speed:.1f} videos/s. Written to {result.output}")
    if result.report is not None:
        console.say(f"Report: {result.report}")


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def _compare(settings: EvalSettings, verbosity: Verbosity) -> None:
    """Say whether the second of two models is better, and which videos they see differently."""
    from tvit_cli.console import Console
    from tvit_cli.engine.evaluate.compare import compare

    with Console(verbosity) as console:
        result = compare(settings, console.report)
    flips = [("gained", *pair) for pair in result.gained] + [("lost", *pair) for pair in result.lost]
    if flips:
        rows = [(what, a.video.name, a.video.label, a.predicted, b.predicted) for what, a, b in flips]
        console.table(["", "video", "class", "first said", "second said"], rows)
        console.say("")
    names = [name for name in result.first.metrics if name in result.second.metrics]
    both = [
        (name, f"{result.first.metrics[name]:.4f}", f"{result.second.metrics[name]:.4f}") for name in names
    ]
    console.table(["metric", "first", "second"], both)
    console.say(
        f"\nTop-1 {result.difference:+.4f} on {result.videos} videos (95 % interval "
        f"{_interval(result.interval) or 'not known: one group'}): {len(result.gained)} gained, "
        f"{len(result.lost)} lost, McNemar p = {result.p_value:.3g}. Written to {result.output}"
    )
    if result.report is not None:
        console.say(f"Report: {result.report}")


def predict(loaded: Loaded[PredictSettings], verbosity: Verbosity) -> None:
    """Label videos as a table, JSON lines or CSV; exit code 1 if some could not be read."""
    from tvit_cli.console import Console, read_list
    from tvit_cli.engine import predict as engine

    settings = loaded.settings
    if "-" in settings.paths:
        settings = settings.model_copy(update={"paths": _with_list(settings.paths, read_list())})
    if settings.window is not None:
        _timelines(settings, verbosity)
        return
    with Console(verbosity) as console:
        result = engine.predict(settings, console.report)
    if settings.json_lines:
        for p in result.predictions:
            labels = [{"label": label, "score": score} for label, score in p.labels]
            console.json_line(
                {"video": p.video} | ({"error": p.error} if p.error else {"predictions": labels})
            )
    elif settings.csv:
        console.csv(["video", "rank", "label", "score", "error"], _prediction_rows(result.predictions))
    else:
        rows = [
            (p.video if rank == 0 else "", label, f"{score:.3f}")
            for p in result.predictions
            for rank, (label, score) in enumerate(p.labels)
        ]
        if rows:
            console.table(["video", "label", "score"], rows)
    failed = {p.video: p.error for p in result.predictions if p.error}
    _end_with_failures(console, failed, len(result.predictions), result.unwritten)


def _timelines(settings: PredictSettings, verbosity: Verbosity) -> None:
    """Show the segments of each video's timeline."""
    from tvit_cli.console import Console
    from tvit_cli.engine.predict import predict_timelines

    with Console(verbosity) as console:
        told = predict_timelines(settings, console.report)
    found = [(t.video, s) for t in told if t.timeline for s in t.timeline.segments]
    columns = ["video", "start", "end", "label", "score"]
    if settings.json_lines:
        for t in told:
            answer: dict[str, object] = {"video": t.video}
            if t.timeline is None:
                answer["error"] = t.error
            else:
                answer |= {
                    "seconds": t.timeline.seconds,
                    "segments": [asdict(s) for s in t.timeline.segments],
                }
            console.json_line(answer)
    elif settings.csv:
        rows: list[tuple[object, ...]] = [
            (video, f"{s.start:.3f}", f"{s.end:.3f}", s.label, s.score, "") for video, s in found
        ]
        rows += [(t.video, "", "", "", "", t.error) for t in told if t.error]
        console.csv([*columns, "error"], rows)
    elif found:
        shown = [(v, f"{s.start:.2f}", f"{s.end:.2f}", s.label, f"{s.score:.3f}") for v, s in found]
        console.table(columns, shown)
    unwritten = [reason for t in told for reason in t.unwritten]
    _end_with_failures(console, {t.video: t.error for t in told if t.error}, len(told), unwritten)


def _with_list(paths: tuple[str, ...], listed: list[str]) -> tuple[str, ...]:
    """The paths with those of stdin in the place of the first `-`."""
    if not listed:
        raise DataError(
            "-: stdin holds no path. Give a list, one path a line: find clips -name '*.mp4' | tvit predict -"
        )
    place = paths.index("-")
    return (*paths[:place], *listed, *(path for path in paths[place:] if path != "-"))


def _prediction_rows(predictions: Sequence[Prediction]) -> Iterator[tuple[object, ...]]:
    for p in predictions:
        if p.error:
            yield p.video, "", "", "", p.error
        for rank, (label, score) in enumerate(p.labels, 1):
            yield p.video, rank, label, score, ""


def _end_with_failures(
    console: Console, failed: Mapping[str, str], videos: int, unwritten: Sequence[str]
) -> None:
    for name, error in failed.items():
        console.warn(f"{name}: {error}")
    problems = [*unwritten, *([f"{len(failed)} of {videos} videos could not be read."] if failed else [])]
    if problems:
        raise RunError("\n".join(problems))


def export(loaded: Loaded[ExportSettings], verbosity: Verbosity) -> None:
    """Write an export and say how far its answers lie from the model's."""
    from tvit_cli.console import Console, size
    from tvit_cli.engine import export as engine

    with Console(verbosity) as console:
        result = engine.export(loaded.settings, console.report)
    parity = result.parity
    console.table(
        ["the export against the model", "found", "limit"],
        [
            ("clips", str(parity.videos), ""),
            (
                "largest difference of a logit",
                f"{parity.max_logit_difference:.1e}",
                _limit(parity.logit_limit),
            ),
            ("top-1 agreement", f"{parity.top1_agreement:.3f}", f"{parity.agreement_limit:g}"),
        ],
    )
    console.say(f"\nOn {parity.clips}. Written to {result.output} ({size(result.bytes)}).")
    if result.url is not None:
        console.say(f"Uploaded to {result.url}")


def shut_down(*, graceful: bool) -> None:
    """Leave the processes that this one shared its work with, if there are any: see `engine.parallel.leave`."""
    together = sys.modules.get("torch.distributed")  # whoever shares work has loaded it
    if together is not None and together.is_available() and together.is_initialized():
        from tvit_cli.engine.distributed import shutdown

        shutdown(graceful=graceful)


def _limit(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
