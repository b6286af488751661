"""The verbs: settings in, `api` called, result printed. The engine is imported when a verb runs."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from tvit_cli.errors import DataError, Interrupted, RunError, plural, shorten, size_text

if TYPE_CHECKING:
    from pathlib import Path

    from tvit_cli.console import Console
    from tvit_cli.results import (
        Comparison,
        DryRun,
        Event,
        Prediction,
        Scan,
        SegmentFound,
        SegmentsEnd,
        SeriesResult,
        WindowPrediction,
    )
    from tvit_cli.settings.base import Loaded
    from tvit_cli.settings.download import DownloadSettings
    from tvit_cli.settings.eval import EvalSettings
    from tvit_cli.settings.export import ExportSettings
    from tvit_cli.settings.extract import ExtractSettings
    from tvit_cli.settings.predict import PredictSettings
    from tvit_cli.settings.train import TrainSettings

UNSURE = 0.5  # scores below it are counted


def download(loaded: Loaded[DownloadSettings], console: Console) -> None:
    """Fetches, verifies or repairs a data set, or lists the known ones."""
    from tvit_cli.api import run_download
    from tvit_cli.engine.download import known_datasets

    if loaded.settings.list_sets:
        rows = []
        for d in known_datasets():
            size = size_text(d.bytes) if d.bytes else "unknown" if d.videos else "none"
            rows.append((d.name, d.classes, f"{d.clips:,}", size, d.licence, d.title))
        console.table(["name", "classes", "clips", "download", "licence", "title"], rows)
        return
    result = console.run(run_download, loaded)
    for difference in result.differences:
        console.warn(f"{difference.path}: {difference.kind}: {difference.detail}")
    if count := len(result.differences):
        repair = f"tvit download {result.name} --repair"
        raise RunError(f"{result.folder}: {plural(count, 'difference')} from the manifest. Repair: {repair}")
    new = plural(result.new_files, "new file") if result.new_files else "complete already"
    fetched = f", {size_text(result.bytes_received)} fetched" if result.bytes_received else ""
    content = f"{plural(result.videos, 'video')} of {plural(result.classes, 'class')}"
    console.print(f"{result.folder}: {content}; {new}{fetched}.")


def extract(loaded: Loaded[ExtractSettings], console: Console) -> None:
    """Writes a frame store and prints its size, or prints the results of `--check`."""
    from tvit_cli.api import run_extract

    result = console.run(run_extract, loaded)
    if isinstance(result, tuple):
        _print_check(console, result, as_json=loaded.settings.json_lines)
        return
    console.print(
        f"{plural(result.videos, 'video')} extracted ({size_text(result.bytes)}, {result.seconds:.1f} s), "
        f"{result.skipped} already stored, {len(result.unreadable)} unreadable."
    )
    console.print(f"Frame store: {result.folder}")


def _print_check(console: Console, scans: Sequence[Scan], *, as_json: bool) -> None:
    if as_json:
        for scan in scans:
            console.json_line({**asdict(scan), "path": str(scan.path)})
    else:
        rows: list[tuple[object, ...]] = []
        for s in scans:
            size = f"{s.width}x{s.height}" if s.is_readable else ""
            rate = f"{s.rate:.2f}" if s.rate else ""
            turn = f"{s.rotation} mirrored" if s.mirrored else s.rotation
            rows.append((s.path, s.codec, size, s.frames, f"{s.seconds:.2f}", rate, turn, s.problem))
        columns = ["video", "codec", "size", "frames", "seconds", "fps", "rotation", "problem"]
        if not console.is_verbose:
            columns, rows = ["video", "problem"], [(s.path, s.problem) for s in scans if s.problem]
        if rows:
            console.table(columns, rows)
            console.print("")
        console.table(["summary", ""], _check_summary(scans))
    total = plural(len(scans), "video")
    if bad := sum(not scan.is_readable for scan in scans):
        raise RunError(f"{bad} of {total} cannot be read.")
    if not as_json:
        console.print(f"{len(scans)} of {total} can be read.")


def _check_summary(scans: Sequence[Scan]) -> list[tuple[str, str]]:
    """Facts on the readable videos of a check, in one line each."""
    from tvit_cli.console import duration

    def count(values: Iterable[str], most: int = 4) -> str:
        return shorten((f"{value} ({n})" for value, n in Counter(values).most_common()), most)

    good = [scan for scan in scans if scan.is_readable]
    classes = Counter(scan.label for scan in good).most_common()
    labels = [f"{label} ({n})" for label, n in classes]
    if len(labels) > 8:
        labels = [*labels[:3], f"… {len(labels) - 6} more", *labels[-3:]]
    rows = [("clips", f"{plural(len(classes), 'class')}: {', '.join(labels)}")]
    if good:
        seconds, frames = sorted(scan.seconds for scan in good), sorted(scan.frames for scan in good)
        each = f"{seconds[0]:.3g} to {seconds[-1]:.3g} s, median {seconds[len(seconds) // 2]:.3g} s"
        rows += [
            ("length", f"{duration(sum(seconds))}; a video {each}"),
            ("frames", f"{frames[0]:,} to {frames[-1]:,} in a video"),
            ("size", count(f"{scan.width}x{scan.height}" for scan in good)),
            ("rate", count(f"{scan.rate:.4g} fps" if scan.rate else "unknown" for scan in good)),
            ("codec", count(scan.codec for scan in good)),
        ]
    if turned := [
        f"{s.rotation}°{' mirrored' if s.mirrored else ''}" for s in good if s.rotation or s.mirrored
    ]:
        rows.append(("rotation", count(turned)))
    return rows


def train(loaded: Loaded[TrainSettings], console: Console) -> None:
    """Trains a model, or one per seed and split, and prints its metrics, its folder and the next commands."""
    from tvit_cli.api import run_train
    from tvit_cli.results import DryRun, SeriesResult

    if loaded.settings.show_settings:
        _print_settings(console, loaded)
        return
    if _run_processes(loaded.settings.num_processes, resumes=True):
        return
    result = console.run(run_train, loaded)
    if isinstance(result, DryRun):
        _print_plan(console, result)
        return
    if isinstance(result, SeriesResult):
        _print_series(console, result, ("val_video_top1", "val_loss", "test_video_top1"))
        return
    if result.epochs:
        last = result.epochs[-1]
        wait = f"{last['data_wait']:.0%} of the time waiting for data"
        console.print(f"Epoch {last['epoch']:.0f}: {last['clips_per_second']:.3g} clips/s, {wait}.")
    if best := result.best:
        scores = f"validation top-1 {best['val_video_top1']:.3f} (loss {best['val_loss']:.3f})"
        console.print(f"Best epoch {result.best_epoch}: {scores}.")
    if result.test is not None:
        top1, videos = (result.test.metrics[name] for name in ("video_top1", "videos"))
        count = plural(round(videos), "test video")
        console.print(f"Test top-1 {top1:.3f} on {count}, none of them used in training.")
    _print_report(console, result.report)
    model = result.model
    console.next_steps(model, [f"tvit predict VIDEO --model {model}", f"tvit eval --model {model}"])


def _print_settings(console: Console, loaded: Loaded[TrainSettings]) -> None:
    series = [settings.model_dump(mode="json", exclude={"show_settings"}) for settings in loaded.series]
    shown = {name: dict.fromkeys(json.dumps(values[name]) for values in series) for name in series[0]}
    rows = [(name, ",".join(values), loaded.origins[name]) for name, values in shown.items()]
    console.table(["setting", "value", "from"], rows)


def _print_plan(console: Console, plan: DryRun) -> None:
    from tvit_cli.console import duration

    memory, clips = plan.memory, plan.micro_batch
    terms = ("weights", "gradients", "moments", "average", "workspace")
    parts = [f"{name} {size_text(getattr(memory, name))}" for name in terms if getattr(memory, name)]
    parts.append(f"{plural(clips, 'clip')} × {size_text(memory.activations_per_clip)}")
    step_flops = f"{plan.pass_flops * plan.clips_per_step / 1e12:,.3f} TFLOP per step"
    rows = {
        "run": plan.folder,
        "data": plan.data,
        "model": plan.model,
        "parameters": f"{plan.parameters:,}, {plan.trainable:,} trained",
        "device": f"{plan.device}, {plan.precision} mixed precision",
        "batch": plan.batch,
        "steps": f"{plural(plan.epochs, 'epoch')} of {plural(plan.steps_per_epoch, 'step')}",
        "evaluated clip": f"{plan.forward_flops / 1e9:,.2f} GFLOP, forward",
        "trained clip": f"{plan.pass_flops / 1e9:,.2f} GFLOP, forward and backward; {step_flops}",
        "memory": f"{size_text(memory.needed(clips))} of {size_text(plan.available)}: {' + '.join(parts)}",
        "step": f"{plan.seconds_per_step:.3g} s, {plan.data_wait:.0%} of it waiting for data",
        "validation": duration(plan.validation_seconds),
        "epoch": duration(plan.seconds_per_epoch),
        "all epochs": duration(plan.epochs * plan.seconds_per_epoch),
    }
    console.table(["dry run", ""], rows.items())
    if memory.needed(clips) > plan.available:
        console.warn("The training needs more memory than is available. Take --per-gpu-batch-size auto.")


def _run_processes(count: int, *, resumes: bool) -> bool:
    """Runs this command in `count` processes; False for one process, or inside one of them."""
    from tvit_cli.engine.launch import is_launched, run_local_processes

    if count == 1 or is_launched():
        return False
    if code := run_local_processes(count, sys.argv[1:], resumes=resumes):
        sys.exit(code)
    return True


def _print_report(console: Console, report: Path | None) -> None:
    if report is not None:
        console.print(f"Report: {report}")


def _require_report(report: Path | None, folder: Path) -> None:
    """Raises RunError in the main process if the report of an evaluation is missing."""
    from tvit_cli.console import is_main_process

    if report is None and is_main_process():
        advice = "Free some space, then repeat the command."
        raise RunError(f"{folder}: the report is missing; all other results are complete. {advice}")


def _print_series(console: Console, result: SeriesResult, metrics: Iterable[str]) -> None:
    names = [name for name in metrics if name in result.summary]
    rows = [(run, *(f"{found[name]:.3f}" for name in names)) for run, found in result.runs.items()]
    for number, row in enumerate(("mean", "sd")):
        rows.append((row, *(f"{result.summary[name][number]:.3f}" for name in names)))
    console.table(["run", *(name.replace("_", " ") for name in names)], rows)
    console.print(f"\nWritten to {result.folder}")
    _print_report(console, result.report)


def evaluate(loaded: Loaded[EvalSettings], console: Console) -> None:
    """Scores a model and prints metrics overall and per class, or compares two models."""
    from tvit_cli.api import run_evaluate
    from tvit_cli.results import Comparison, SeriesResult

    if _run_processes(loaded.settings.num_processes, resumes=False):
        return
    result = console.run(run_evaluate, loaded)
    if isinstance(result, Comparison):
        _print_comparison(console, result)
        return
    if isinstance(result, SeriesResult):
        _print_series(console, result, (n for n in result.summary if n not in ("videos", "unreadable")))
        _require_report(result.report, result.folder)
        return
    for note in result.notes:
        console.warn(note)
    rows = [
        (label, c.videos, f"{c.recall:.3f}", f"{c.precision:.3f}", f"{c.f1:.3f}")
        for label, c in sorted(result.per_class.items())
    ]
    console.table(["class", "videos", "top-1", "precision", "F1"], rows)
    console.print("")
    if result.confused:
        console.table(["most confused", "predicted as", "videos"], result.confused)
        console.print("")
    metrics = []
    for name, value in result.metrics.items():
        metrics.append((name, _metric(name, value), _interval(result.intervals.get(name))))
    console.table(["metric", result.subset, "95 % interval"], metrics)
    speed = result.metrics["videos"] / result.seconds
    console.print(f"\n{result.seconds:.1f} s, {speed:.1f} videos/s. Written to {result.output}")
    _print_report(console, result.report)
    _require_report(result.report, result.output)


def _metric(name: str, value: float) -> str:
    return f"{value:.{0 if name in ('videos', 'unreadable') else 4}f}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def _print_comparison(console: Console, result: Comparison) -> None:
    rows = [
        (change, a.video.name, a.video.label, a.predicted, b.predicted)
        for change, pairs in (("gained", result.gained), ("lost", result.lost))
        for a, b in pairs
    ]
    if rows:
        console.table(["change", "video", "class", "first model", "second model"], rows)
        console.print("")
    first, second = result.first.metrics, result.second.metrics
    metrics = [(n, _metric(n, first[n]), _metric(n, second[n])) for n in first if n in second]
    console.table(["metric", "first model", "second model"], metrics)
    console.print(
        f"\nTop-1 {result.difference:+.4f} on {plural(result.videos, 'video')} (95 % interval "
        f"{_interval(result.interval) or 'unknown: one group only'}): {len(result.gained)} gained, "
        f"{len(result.lost)} lost, McNemar p = {result.p_value:.3g}. Written to {result.output}"
    )
    _print_report(console, result.report)
    _require_report(result.report, result.output)


def predict(loaded: Loaded[PredictSettings], console: Console) -> None:
    """Labels videos and prints a table, JSON lines or CSV. Raises RunError if some could not be read."""
    from tvit_cli.api import run_predict

    settings = loaded.settings
    if "-" in settings.paths and not _stdin_is_video():
        listed = [line for text in sys.stdin if (line := text.rstrip("\r\n"))]
        if not listed:
            raise DataError(
                "-: stdin is empty. Give a path per line: find clips -name '*.mp4' | tvit predict -"
            )
        first = settings.paths.index("-")
        others = [path for path in settings.paths[first:] if path != "-"]
        settings = settings.model_copy(update={"paths": (*settings.paths[:first], *listed, *others)})
    answers = Answers(console, settings)
    stop: Interrupted | None = None
    try:
        with console:
            result = run_predict(replace(loaded, series=(settings,)), answers.report)
    except Interrupted as error:
        stop, result = error, error.result or ()
    finally:
        answers.finish()
    found = result if isinstance(result, tuple) else (result,)
    problems = [reason for one in found for reason in one.unwritten]
    if stop is not None:
        for reason in problems:
            console.warn(reason)
        raise stop
    if answers.failed:
        problems.append(f"{len(answers.failed)} of {plural(answers.videos, 'video')} could not be read.")
    if problems:
        raise RunError("\n".join(problems))


def _stdin_is_video() -> bool:
    """Whether stdin brings the bytes of a video: its start has control characters, which no list of paths has."""
    peek = getattr(getattr(sys.stdin, "buffer", None), "peek", lambda size: b"")
    return re.match(rb"YUV4MPEG2 |(?s:.){,4096}?[\x00-\x08\x0e-\x1f]", peek(4096)) is not None


class Answers:
    """Prints predictions and segments as they are reported, flushed: a table, JSON lines or CSV.

    `report` takes an engine's events; those that are no answers go to the console.
    """

    def __init__(self, console: Console, settings: PredictSettings) -> None:
        self.videos = self._windows = 0
        self.failed: dict[str, str] = {}  # reason by video
        self._console, self._settings = console, settings
        self._row: Callable[[Iterable[object]], None] = lambda row: None
        self._is_open = False  # whether a line of JSON is unfinished
        self._labels: Counter[str] = Counter()
        self._unsure: Counter[str] = Counter()

    def report(self, event: Event) -> None:
        """Prints an event."""
        from tvit_cli.results import AnswersStart, Prediction, SegmentFound, SegmentsEnd, WindowPrediction

        match event:
            case AnswersStart():
                is_timeline = self._settings.window is not None
                times = dict.fromkeys(("start", "end") * is_timeline, ("000.00",))
                texts = {"video": event.videos, **times, "label": event.labels, "score": ("0.000",)}
                self._row = self._console.growing_table(texts)
                if self._settings.csv:
                    rank = () if is_timeline else ("rank",)
                    self._console.csv(("video", *rank, *list(texts)[1:], "error"))
            case Prediction():
                self._prediction(event)
            case SegmentFound():
                self._segment(event)
            case SegmentsEnd():
                self._end(event)
            case WindowPrediction():
                self._window(event)
            case _:
                self._console.report(event)

    def _prediction(self, found: Prediction) -> None:
        video, self.videos = found.video, self.videos + 1
        if found.error:
            self.failed[video] = found.error
        else:
            self._labels[found.label] += 1
            self._unsure[found.label] += found.labels[0][1] < UNSURE
        if self._settings.json_lines:
            labels = [{"label": label, "score": score} for label, score in found.labels]
            self._console.json_line(
                {"video": video, **({"error": found.error} if found.error else {"predictions": labels})}
            )
        elif self._settings.csv:
            rows: list[tuple[object, ...]] = [
                (video, rank, label, score, "") for rank, (label, score) in enumerate(found.labels, 1)
            ]
            self._console.csv(*(rows or [(video, "", "", "", found.error)]))
        else:
            for rank, (label, score) in enumerate(found.labels):
                self._row((video if rank == 0 else "", label, f"{score:.3f}"))

    def _segment(self, found: SegmentFound) -> None:
        video, s = found.video, found.segment
        if self._settings.json_lines:
            begin = (
                ", " if self._is_open else self._console.json_text({"video": video})[:-1] + ', "segments": ['
            )
            self._console.write(begin + self._console.json_text(asdict(s)))
            self._is_open = True
        elif self._settings.csv:
            self._console.csv((video, f"{s.start:.3f}", f"{s.end:.3f}", s.label, s.score, ""))
        else:
            self._row((video, f"{s.start:.2f}", f"{s.end:.2f}", s.label, f"{s.score:.3f}"))

    def _end(self, end: SegmentsEnd) -> None:
        self.videos += 1
        if end.error:
            self.failed[end.video] = end.error
        if self._settings.json_lines:
            rest = {"error": end.error} if end.error else {"seconds": end.seconds}
            if self._is_open:
                self._console.write(f"], {self._console.json_text(rest)[1:]}\n")
            else:
                self._console.json_line({"video": end.video, **rest})
            self._is_open = False
        elif self._settings.csv and end.error:
            self._console.csv((end.video, "", "", "", "", end.error))

    def _window(self, found: WindowPrediction) -> None:
        columns = ("time", "start", "end", "label", "score")
        if self._settings.json_lines:
            values = {name: getattr(found, name) for name in ("video", *columns, "dropped")}
            self._console.json_line({**values, "time": found.time.isoformat()})
            return
        time = found.time.isoformat(sep=" ", timespec="milliseconds")[:23]
        row = (time, f"{found.start:.2f}", f"{found.end:.2f}", found.label, f"{found.score:.3f}")
        if self._windows == 0:
            widest = ((text,) for text in (time, "00000.00", "00000.00", *row[3:]))
            self._row = self._console.growing_table(dict(zip(columns, widest, strict=True)))
            if self._settings.csv:
                self._row = self._console.csv
                self._row(columns)
        self._windows += 1
        self._row(row)

    def finish(self) -> None:
        """Prints the count of each label below the table, or on stderr, and warnings of unreadable videos."""
        if self._is_open:
            self._console.write("]}\n")
        if self._labels.total() > 1:
            by_count = sorted(self._labels, key=lambda label: (-self._labels[label], label))
            rows = [(label, self._labels[label], self._unsure[label]) for label in by_count]
            rows.append(("all", self._labels.total(), self._unsure.total()))
            is_machine_readable = self._settings.json_lines or self._settings.csv
            if not is_machine_readable:
                self._console.print("")
            self._console.table(["label", "videos", f"below {UNSURE:g}"], rows, on_stderr=is_machine_readable)
        for name, error in self.failed.items():
            self._console.warn(f"{name}: {error}")


def export(loaded: Loaded[ExportSettings], console: Console) -> None:
    """Writes an export and prints its parity with the model."""
    from tvit_cli.api import run_export

    result = console.run(run_export, loaded)
    parity = result.parity
    limit = "" if parity.logit_limit is None else f"at most {parity.logit_limit:g}"
    rows = [
        ("clips", str(parity.videos), ""),
        ("largest logit difference", f"{parity.max_logit_difference:.1e}", limit),
        ("top-1 agreement", f"{parity.top1_agreement:.3f}", f"at least {parity.agreement_limit:g}"),
    ]
    console.table(["parity with the model", "found", "limit"], rows)
    console.print(f"\nOn {parity.clips}. Written to {result.output} ({size_text(result.bytes)}).")
    if result.url is not None:
        console.print(f"Uploaded to {result.url}")


def shut_down(*, graceful: bool) -> None:
    """Ends the process group of torch.distributed, if it was started. See `engine.distributed.shutdown`."""
    distributed = sys.modules.get("torch.distributed")  # loaded by every process of a group
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from tvit_cli.engine.distributed import shutdown

        shutdown(graceful=graceful)
