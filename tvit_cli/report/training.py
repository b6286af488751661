"""Report of a training: report.html in the run's folder, and its curves as PNGs beside it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from tvit_cli.data.layout import SUBSETS
from tvit_cli.errors import natural_key
from tvit_cli.report.charts import Curve, curves_chart, worst_first
from tvit_cli.report.drawing import Drawing
from tvit_cli.report.evaluation import bar_rows, page_title
from tvit_cli.report.film import Samples, clip_pictures
from tvit_cli.report.html import Context, Tile, count, duration, href, number, percent, render, write_pages
from tvit_cli.results import TrainResult
from tvit_cli.settings.base import extra, flag
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.train import TrainSettings

TOP = "val_video_top"  # prefix of the metrics of top-k accuracy

Points = list[tuple[float, float | None]]


def write_training_report(
    result: TrainResult,
    settings: TrainSettings,
    samples: Samples,
    preprocessing: Preprocessing,
    context: Context,
) -> Path:
    """Writes report.html and plots/*.png into the run's folder; returns the page's path."""
    drawings = curves(result)
    page = training_page(result, settings, samples, preprocessing, context, drawings.values())
    test = result.test
    links = {} if test is None else {test.output / "report.html": page_title(test)}
    return write_pages(result.run, page, drawings, title=f"Training: {result.run.name}", links=links)


def training_page(
    result: TrainResult,
    settings: TrainSettings,
    samples: Samples,
    preprocessing: Preprocessing,
    context: Context,
    drawings: Iterable[Drawing | None],
) -> str:
    """HTML page of a training."""
    done, planned = len(result.epochs), settings.epochs
    videos = sorted(result.videos.items(), key=lambda item: natural_key(item[0]))
    rows = _setting_rows(settings, context.device.type)
    return render(
        "training.html.j2",
        context,
        result=result,
        state=f"{done} of {planned} epochs" if done < planned else f"{planned} epochs",
        tiles=_headline(result),
        drawings=list(drawings),
        classes=bar_rows(worst_first(result.per_class)),
        strips=[
            {
                **clip_pictures(clip, preprocessing),
                "caption": caption,
                "href": href(path, result.run) if path.is_file() else "",
            }
            for clip, caption, path in samples.clips
        ],
        subsets=SUBSETS,
        totals=("all", *(sum(counts.get(s, 0) for counts in result.videos.values()) for s in SUBSETS)),
        videos=[(label, *(counts.get(s, 0) for s in SUBSETS)) for label, counts in videos],
        settings=[row for row, _ in rows],
        changed={n: row for n, (row, is_changed) in enumerate(rows) if is_changed},
    )


def curves(result: TrainResult) -> dict[str, Drawing | None]:
    """Charts of a training by file name; None without a point."""
    per_epoch = result.epochs[0]["step"] / result.epochs[0]["epoch"]

    def by_epoch(key: str) -> Points:
        return [(r["epoch"], r[key]) for r in result.epochs if key in r]

    def by_step(key: str) -> Points:
        return [(r["step"] / per_epoch, r[key]) for r in result.steps]

    norms: dict[int, list[float]] = {}
    for record in result.steps:
        if record["grad_norm"] is not None:
            norms.setdefault(record["epoch"], []).append(record["grad_norm"])
    means: Points = [(epoch, statistics.fmean(values)) for epoch, values in norms.items()]
    top_k = dict.fromkeys(k for r in result.epochs for k in r if k.startswith(TOP) and k != f"{TOP}1")

    def chart(
        title: str, *lines: Curve, show: Callable[[float], str] = number, marks_best: bool = False
    ) -> Drawing | None:
        y_range = (0.0, 1.0) if show is percent else None
        mark = (result.best_epoch, "best") if marks_best and result.best else None
        return curves_chart(title, lines, x_name="epoch", show=show, y_range=y_range, mark=mark)

    return {
        "loss": chart(
            "Loss",
            Curve("train, per step", by_step("train_loss"), "one", faint=True),
            Curve("train", by_epoch("train_loss"), "one"),
            Curve("val", by_epoch("val_loss"), "two"),
            marks_best=True,
        ),
        "accuracy": chart(
            "Accuracy",
            Curve("train clip top-1", by_epoch("train_clip_top1"), "one"),
            Curve("val top-1", by_epoch("val_video_top1"), "two"),
            *(Curve(f"val top-{k.removeprefix(TOP)}", by_epoch(k), "three", faint=True) for k in top_k),
            show=percent,
            marks_best=True,
        ),
        "learning_rate": chart("Learning rate", Curve("learning rate", by_step("learning_rate"), "one")),
        "gradient_norm": chart(
            "Gradient norm, before clipping",
            Curve("per step", by_step("grad_norm"), "one", faint=True),
            Curve("mean of the epoch", means, "one"),
        ),
        "throughput": chart("Throughput, clips/s", Curve("clips/s", by_epoch("clips_per_second"), "one")),
        "data_wait": chart(
            "Data loading, share of the time", Curve("waiting", by_epoch("data_wait"), "one"), show=percent
        ),
    }


def _headline(result: TrainResult) -> list[Tile]:
    """The test result if there is one, validation of the best epoch, time and size."""
    found = []
    if result.test is not None:
        remark = f"{result.test.metrics['videos']:.0f} videos"
        if interval := result.test.intervals.get("video_top1"):
            remark += f"; 95 % within {100 * interval[0]:.0f}–{100 * interval[1]:.0f} %"
        found.append(Tile("test top-1", percent(result.test.metrics["video_top1"]), remark))
    best = next((r for r in result.epochs if result.best and r["epoch"] == result.best_epoch), None)
    remark = f"best epoch, {result.best_epoch} of {len(result.epochs)}"
    if best is not None:
        top_k = [key for key in best if key.startswith(TOP)]
        found += [Tile(f"val top-{k.removeprefix(TOP)}", percent(best[k]), remark) for k in top_k]
        found.append(Tile("val loss", number(best["val_loss"]), remark))
    last = result.epochs[-1]
    seconds = sum(r["seconds"] for r in result.epochs)
    trained, total = result.parameters
    return [
        *found,
        Tile("train loss", number(last["train_loss"]), f"last epoch, {last['epoch']}"),
        Tile("training time", duration(seconds), "without validation"),
        Tile("trained parameters", count(trained), f"of {count(total)}"),
    ]


def _setting_rows(settings: TrainSettings, device: str) -> list[tuple[tuple[str, str, str], bool]]:
    """((Option, value, default), whether they differ) of each setting."""
    fields = TrainSettings.model_fields
    own = TrainSettings(hf_model_name=settings.hf_model_name)  # some defaults depend on it
    defaults = own.model_dump(mode="json") | {"hf_model_name": fields["hf_model_name"].default}
    chosen = {"mixed_precision": ("bf16",) if device == "cuda" else ("no", "bf16")}  # by auto
    rows = []
    for name, value in settings.model_dump(mode="json").items():
        default = extra(fields[name]).get("default_text") or defaults[name]
        row = (flag(name), _shown(value), _shown(default))
        is_changed = value not in (defaults[name], *chosen.get(name, ())) and row[1] != row[2]
        rows.append((row, is_changed))
    return rows


def _shown(value: object) -> str:
    """A setting as typed on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return value if isinstance(value, str) else json.dumps(value)
