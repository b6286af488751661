"""What a training shows when it ends: report.html in the run's folder, and its curves as PNGs beside it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tvit_cli.data.layout import SUBSETS
from tvit_cli.report import html
from tvit_cli.report.charts import Curve, curves_chart
from tvit_cli.report.drawing import Drawing
from tvit_cli.report.film import Samples, film_strip
from tvit_cli.report.html import count, duration, hardware, number, percent, software, write_pages
from tvit_cli.settings.base import extra, flag
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.train import TrainSettings

Record = Mapping[str, Any]


@dataclass(frozen=True)
class TrainingFacts:
    """All that the page of a training says, beside what it finds out about the machine.

    `problem` is why the run ended early ("" where it did not); `epochs` and `steps` are the records of
    metrics.jsonl of each kind; `per_class` maps a label to (videos, right answers) of the best epoch's
    validation; `best_step` is 0 without validation; `test_interval` is the 95 % interval of the test top-1.
    """

    folder: Path
    settings: TrainSettings
    preprocessing: Preprocessing
    device: torch.device
    plan: Mapping[str, str]
    steps_per_epoch: int
    problem: str
    epochs: Sequence[Record]
    steps: Sequence[Record]
    best_step: int
    per_class: Mapping[str, tuple[int, int]]
    videos: Mapping[str, Mapping[str, int]]  # label -> subset -> count
    unreadable: Mapping[str, str]  # video name -> reason
    samples: Samples
    parameters: tuple[int, int]  # trained, all
    commands: Sequence[tuple[str, str]]
    test: Mapping[str, float] = field(default_factory=dict)
    test_interval: tuple[float, float] | None = None


def write_training_report(facts: TrainingFacts) -> Path:
    """Write report.html and plots/*.png into the run's folder; returns the page's path."""
    drawings = curves(facts)
    return write_pages(facts.folder, training_page(facts, drawings.values()), drawings)


def training_page(facts: TrainingFacts, drawings: Iterable[Drawing | None]) -> str:
    """The page of a training, as HTML."""
    done, planned = len(facts.epochs), facts.settings.epochs
    state = f"{done} of {planned} epochs" if done < planned else f"{planned} epochs"
    return html.page(
        facts.folder.name,
        f"tvit train · {state} · {time.strftime('%Y-%m-%d %H:%M')}",
        [
            html.notice(facts.problem),
            html.tiles(_headline(facts)),
            html.section("Curves", html.charts(drawings)),
            _per_class(facts),
            _samples(facts),
            html.section("What to do next", html.commands(facts.commands)),
            html.section("The run", html.facts(facts.plan)),
            _data(facts),
            _settings(facts.settings),
            html.section("Software", html.facts(software(Path.cwd()))),
            html.section("Hardware", html.facts(hardware(facts.device))),
        ],
        footer=f"{facts.folder.absolute()}",
    )


def curves(facts: TrainingFacts) -> dict[str, Drawing | None]:
    """The charts of a training by file name; None where there is no point."""
    best = (facts.best_step / facts.steps_per_epoch, "best") if facts.best_step else None

    def by_epoch(key: str) -> list[tuple[float, float | None]]:
        return [(r["epoch"], r[key]) for r in facts.epochs if key in r]

    def by_step(key: str) -> list[tuple[float, float | None]]:
        return [(r["step"] / facts.steps_per_epoch, r[key]) for r in facts.steps]

    top_k = next(
        (k for r in facts.epochs for k in r if k.startswith("val_video_top") and k != "val_video_top1"), ""
    )
    return {
        "loss": curves_chart(
            "Loss",
            [
                Curve("train, single steps", by_step("train_loss"), "one", faint=True),
                Curve("train", by_epoch("train_loss"), "one"),
                Curve("val", by_epoch("val_loss"), "two"),
            ],
            x_name="epoch",
            show=number,
            mark=best,
        ),
        "accuracy": curves_chart(
            "Accuracy",
            [
                Curve("train clip top-1", by_epoch("train_clip_top1"), "one"),
                Curve("val top-1", by_epoch("val_video_top1"), "two"),
                Curve(f"val top-{top_k.removeprefix('val_video_top')}", by_epoch(top_k), "three", faint=True),
            ],
            x_name="epoch",
            show=percent,
            y_range=(0, 1),
            mark=best,
        ),
        "learning_rate": curves_chart(
            "Learning rate",
            [Curve("learning rate", by_step("learning_rate"), "one")],
            x_name="epoch",
            show=number,
        ),
        "gradient_norm": curves_chart(
            "Gradient norm, before clipping",
            [
                Curve("single steps", by_step("grad_norm"), "one", faint=True),
                Curve("mean of the epoch", _means(facts, "grad_norm"), "one"),
            ],
            x_name="epoch",
            show=number,
        ),
        "throughput": curves_chart(
            "Clips per second",
            [Curve("clips/s", by_epoch("clips_per_second"), "one")],
            x_name="epoch",
            show=number,
        ),
        "data_wait": curves_chart(
            "Time spent waiting for data",
            [Curve("waiting", by_epoch("data_wait"), "one")],
            x_name="epoch",
            show=percent,
            y_range=(0, 1),
        ),
    }


def _means(facts: TrainingFacts, key: str) -> list[tuple[float, float | None]]:
    """The mean over the steps that are on record for each epoch, at the epoch's end."""
    values: dict[int, list[float]] = {}
    for record in facts.steps:
        if record[key] is not None:
            values.setdefault(record["epoch"], []).append(record[key])
    return [(epoch, statistics.fmean(numbers)) for epoch, numbers in values.items()]


def _headline(facts: TrainingFacts) -> list[html.Tile]:
    """The test result if there is one, the best epoch's validation, time and size."""
    found = []
    if facts.test:
        remark = f"{facts.test['videos']:.0f} videos"
        if facts.test_interval is not None:
            low, high = facts.test_interval
            remark += f"; 95 % within {100 * low:.0f}–{100 * high:.0f} %"
        found.append(html.Tile("test top-1", percent(facts.test["video_top1"]), remark))
    best = next((r for r in facts.epochs if r["step"] == facts.best_step), None)
    if best is not None:
        epoch = f"best epoch, {best['epoch']} of {len(facts.epochs)}"
        found += [
            html.Tile(
                f"val {key.removeprefix('val_video_').replace('top', 'top-')}", percent(best[key]), epoch
            )
            for key in best
            if key.startswith("val_video_top")
        ]
        found.append(html.Tile("val loss", number(best["val_loss"]), epoch))
    last = facts.epochs[-1]
    found.append(html.Tile("train loss", number(last["train_loss"]), f"last epoch, {last['epoch']}"))
    seconds = sum(r["seconds"] for r in facts.epochs)
    found.append(html.Tile("training time", duration(seconds), "without validation"))
    trained, total = facts.parameters
    found.append(html.Tile("trained parameters", count(trained), f"of {count(total)}"))
    return found


def _per_class(facts: TrainingFacts) -> html.Html:
    """A bar for each class, the worst first."""
    rows = sorted(facts.per_class.items(), key=lambda item: (item[1][1] / item[1][0], item[0]))
    bars = [
        (label, right / videos, f"{right} of {videos} · {percent(right / videos)}")
        for label, (videos, right) in rows
    ]
    text = "Top-1 of the best epoch, the worst class first." if bars else ""
    return html.section("Validation by class", html.paragraph(text), html.bars(bars))


def _samples(facts: TrainingFacts) -> html.Html:
    pictures = [
        html.Strip(film_strip(clip, facts.preprocessing), caption, html.text(caption))
        for clip, caption in facts.samples.clips
    ]
    text = "Training clips after augmentation, in the model's own resolution." if pictures else ""
    return html.section("What the model saw", html.paragraph(text), html.strips(pictures))


def _data(facts: TrainingFacts) -> html.Html:
    rows: list[Sequence[object]] = [
        (label, *(counts.get(subset, 0) for subset in SUBSETS)) for label, counts in facts.videos.items()
    ]
    total = ("all", *(sum(counts.get(subset, 0) for counts in facts.videos.values()) for subset in SUBSETS))
    return html.section(
        "Data",
        html.table(("", *SUBSETS), [total]),
        html.folded(f"Videos of each of {len(rows)} classes", html.table(("class", *SUBSETS), rows)),
        html.left_out(facts.unreadable),
    )


def _settings(settings: TrainSettings) -> html.Html:
    """What was changed, then everything."""
    values = settings.model_dump(mode="json")
    defaults = {
        name: info.get_default(call_default_factory=True) for name, info in TrainSettings.model_fields.items()
    }
    defaults = TrainSettings.model_construct(**defaults).model_dump(mode="json")
    changed = [name for name in values if values[name] != defaults[name]]
    rows = {
        name: (flag(name), _shown(values[name]), _shown(_default(name, defaults[name]))) for name in values
    }
    columns = ("setting", "value", "default")
    marked = [number for number, name in enumerate(rows) if name in changed]
    return html.section(
        "Settings",
        html.paragraph(f"{len(changed)} of {len(rows)} differ from their defaults."),
        html.table(columns, [rows[name] for name in changed]),
        html.folded(f"All {len(rows)} settings", html.table(columns, list(rows.values()), changed=marked)),
    )


def _default(name: str, value: object) -> object:
    """A default in words, where the default is found out at run time."""
    return extra(TrainSettings.model_fields[name]).get("default_text") or value


def _shown(value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return value if isinstance(value, str) else json.dumps(value)
