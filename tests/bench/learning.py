"""Accuracy of each attention scheme: Weizmann with people held out, and motions in order and shuffled.

    python tests/bench/learning.py --data weizmann --weights vit-small-patch14-224 [--output learning.jsonl]

One line of JSON is appended as each run ends; runs that have a line are not made again, so the program can be
stopped and started at any time. `--table` prints the tables and stops; `--only TEXT` makes the runs whose key
contains the text.
Parts, in this order:

test/fold1       linear probe, full fine-tuning and LoRA with each scheme, the recipe of
                 examples/configs/leave_people_out.toml, on three people who were left out
motions          each scheme with the quickstart's recipe; its test clips in order and with shuffled frames
test/fold2, 3    the other two thirds of the people
select           schemes and recipes on two of the six training people; the test people are not in the data
test, seeds      the two best of `select` on the people left out, with more seeds
sets             with --sets FOLDER: each of its folders with fold1.csv to fold3.csv (path, label, subset, group) by the
                 preset finetune and by other recipes; test clips in order and with shuffled frames
"""

import argparse
import csv
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))

import torch

from tvit_cli import __version__
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.train import train
from tvit_cli.engine.train.adapt import fit_to_data
from tvit_cli.engine.train.build import build
from tvit_cli.engine.train.dryrun import count_flops
from tvit_cli.errors import Interrupted
from tvit_cli.model.lora import trainable_report
from tvit_cli.results import EpochDone, EvalResult, Event, silent
from tvit_cli.settings.base import load
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "configs" / "leave_people_out.toml"
FOLDS = (("daria", "eli", "moshe"), ("denis", "ido", "lena"), ("ira", "lyova", "shahar"))
SCHEMES = ("joint", "divided", "space", "factorized")
METHODS: dict[str, dict[str, Any]] = {  # name -> what it changes of the recipe
    **{scheme: {"attention": scheme} for scheme in SCHEMES},
    "joint, tubelets of 2": {"attention": "joint", "tubelet_size": 2},
    "linear probe": {"attention": "space", "train": "classifier", "learning_rate": 5e-3, "epochs": 20},
    "full, joint": {"attention": "joint", "train": "all", "layer_decay": 0.65},  # at 5e-5 for all: 0.100
}
RECIPES: dict[str, dict[str, Any]] = {
    "half": {},  # of the patches, for twice as many epochs as before there was --token-drop: as much work
    "base": {"token_drop": 0.0, "epochs": 16},
}
RECIPE, PROBE = "half", "linear probe"  # all but the probe, whose features do not learn, have this recipe
# Recipe on the folds of --sets -> preset, or none for the config, and what it changes of that. Only the preset chooses.
NAIVE = {"learning_rate": 5e-5, "epochs": 30, "token_drop": 0.0, "feature_norm": False, "crop_scale_min": 0.5}
SETS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "preset finetune": ("finetune", {}),
    "linear probe": (None, {**METHODS["linear probe"], "token_drop": 0.0}),
    "naive": (None, {**NAIVE, "train": "all"}),  # all weights at one rate, as in transformers' video guide
    "space": (None, {"attention": "space", "token_drop": 0.0, "epochs": 16}),
    "full, joint": (None, METHODS["full, joint"]),
    "reference": ("reference", {"img_size": 98, "epochs": 32, "log_wandb": False}),
}
VIEWS = {"clips_per_video": 4, "flip": True}  # what every model is scored from besides one view
TRIED_FURTHER = 2  # schemes that `select` tries every recipe with
FINALISTS, SEEDS = 2, (0, 1, 2)
BASELINE = "joint"  # what differences in the table are against
RESAMPLES = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training: what it is called, its settings, and whom it is trained and scored on."""

    part: str
    method: str
    changes: dict[str, Any]
    recipe: str = RECIPE
    seed: int = 0
    fold: int | None = None
    train_people: tuple[str, ...] = field(default=(), compare=False)
    test_people: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        fold = "" if self.fold is None else f"/fold{self.fold}"
        return f"{self.part}{fold}/{self.method}/{self.recipe}/seed{self.seed}"


def jobs(rows: dict[str, Row]) -> Iterator[Job]:
    """All runs in their order; which ones come last depends on the rows of those before."""
    people = sorted(person for fold in FOLDS for person in fold)

    def on(fold: int, part: str, method: str, recipe: str | None = None, seed: int = 0) -> Job:
        recipe = recipe or recipe_of(method)
        testing = FOLDS[fold - 1]
        training = tuple(person for person in people if person not in testing)
        if part == "select":
            testing = (training[0], training[3])
            training = tuple(person for person in training if person not in testing)
        changes = {**RECIPES[recipe], **METHODS[method]}
        return Job(part, method, changes, recipe, seed, fold, training, testing)

    folds = range(1, len(FOLDS) + 1)
    yield from (on(1, "test", method) for method in METHODS)
    for scheme in SCHEMES:
        tubelets = {"attention": scheme, "tubelet_size": 1 if scheme == "space" else 2}
        yield Job("motions", scheme, tubelets, RECIPE)
    yield from (on(fold, "test", method) for fold in folds[1:] for method in METHODS)
    yield from (on(fold, "select", scheme) for fold in folds for scheme in SCHEMES)
    best = [scheme for scheme, _ in selected(rows, folds)][:TRIED_FURTHER]
    further = [recipe for recipe in RECIPES if recipe != RECIPE]
    yield from (on(fold, "select", s, recipe) for recipe in further for s in best for fold in folds)
    for scheme, recipe in selected(rows, folds)[:FINALISTS]:
        seeds = SEEDS[1:] if recipe == RECIPE else SEEDS  # its first seed is among the runs of all methods
        yield from (on(fold, "test", scheme, recipe, seed) for seed in seeds for fold in folds)


def set_jobs(folder: Path) -> Iterator[Job]:
    """Runs on the folds of all sets in a folder: of every set the first fold, then the others, then more seeds."""
    sets = sorted(path.parent.name for path in folder.glob("*/fold1.csv"))
    folds = range(1, len(FOLDS) + 1)
    for fold in folds:
        yield from (Job(name, m, SETS[m][1], "set", fold=fold) for name in sets for m in SETS)
    for seed in SEEDS[1:]:
        yield from (Job(n, "preset finetune", {}, "set", seed, fold) for n in sets for fold in folds)


def recipe_of(method: str) -> str:
    """The recipe of a method among all others."""
    return "base" if method == PROBE else RECIPE


def selected(rows: dict[str, Row], folds: Sequence[int]) -> list[tuple[str, str]]:
    """Schemes with recipes, best first, by the inner people of all folds: top-1, then loss.

    Empty until every scheme was tried; of a scheme only its best recipe is listed.
    """
    tried: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        if row["part"] == "select":
            tried.setdefault((row["method"], row["recipe"]), []).append(row)
    whole = {k: v for k, v in tried.items() if len(v) == len(folds)}
    if {scheme for scheme, _ in whole} != set(SCHEMES):
        return []
    best: dict[str, tuple[str, str]] = {}
    for scheme, recipe in sorted(whole, key=lambda k: (-mean(whole[k], "top1"), mean(whole[k], "loss"))):
        best.setdefault(scheme, (scheme, recipe))
    return list(best.values())


def mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def run(job: Job, options: argparse.Namespace, folder: Path) -> Row:
    """Train and score; the row says everything that the table and the selection need."""
    flags: dict[str, Any] = {**job.changes, "seed": job.seed, "working_directory": folder / "runs"}
    flags |= {"device": "cpu", "num_workers": 0, "test_at_end": True, "max_no_of_checkpoints": 1}
    flags |= {"mixed_precision": options.mixed_precision}
    flags |= {} if options.epochs is None else {"epochs": options.epochs, "warmup_epochs": 0}
    if job.part == "motions":
        settings = load(TrainSettings, preset="quickstart", flags=flags, environ={}).settings
    elif job.recipe == "set":
        manifest_of_fold = options.sets / job.part / f"fold{job.fold}.csv"
        flags |= {"hf_model_name": str(options.weights), "path_to_data": str(manifest_of_fold)}
        flags |= {} if job.method == "preset finetune" else {"val_groups": "none", "test_groups": "auto"}
        preset = SETS[job.method][0]
        config = CONFIG if preset is None else None
        settings = load(TrainSettings, preset=preset, config=config, flags=flags, environ={}).settings
        settings = fit_to_data(settings)
    else:
        flags |= {
            "hf_model_name": str(options.weights),
            "path_to_data": str(manifest(job, options.data, folder)),
        }
        flags |= {"test_groups": "auto"}
        settings = load(TrainSettings, config=CONFIG, flags=flags, environ={}).settings
    settings = settings.model_copy(update={"save_checkpoint_interval": settings.epochs})
    labels = tuple(map(str, range(8 if job.part == "motions" else 10)))
    built = build(settings, labels=labels, report=silent)
    trainable, total = trainable_report(built.model)
    losses: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, EpochDone):
            losses.append(event.metrics["train_loss"])
            print(f"  epoch {event.epoch}: train loss {losses[-1]:.3f}", file=sys.stderr, flush=True)

    wall, cpu = time.perf_counter(), time.process_time()
    result = train(settings, watch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert result.test is not None
    row: Row = {
        "key": job.key, "part": job.part, "method": job.method, "recipe": job.recipe, "seed": job.seed,
        "fold": job.fold, "people": job.test_people, "top1": result.test.metrics["video_top1"],
        "loss": result.test.metrics["loss"], "train_losses": losses,
        "right": right(result.test, whole_names=job.recipe == "set"),
        "minutes": wall / 60, "cpu_minutes": cpu / 60, "trainable": trainable, "parameters": total,
        "flops": count_flops(built.config), "changes": job.changes, "epochs": settings.epochs,
        "learning_rate": settings.learning_rate, "threads": torch.get_num_threads(),
        "precision": options.mixed_precision, "tvit": __version__,
        "commit": commit(), "torch": torch.__version__, "python": platform.python_version(),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip
    again = {"model": result.model, "device": "cpu", "num_workers": 0}
    if job.part == "motions" or job.recipe == "set":
        shuffled = evaluate(EvalSettings.model_validate({**again, "shuffle_frames": True}))
        row["shuffled_top1"] = shuffled.metrics["video_top1"]
        if job.recipe == "set":
            row["class_accuracy"] = result.test.metrics["mean_class_accuracy"]
            row["groups"] = {answer.video.name: answer.video.unit for answer in result.test.answers}
            row["trainable"], row["parameters"] = result.parameters
    else:
        views = evaluate(EvalSettings.model_validate({**again, **VIEWS}))
        row["views_top1"], row["views_right"] = views.metrics["video_top1"], right(views)
    return row


def manifest(job: Job, data: Path, folder: Path) -> Path:
    """A list of the clips of the people that a job may see, and no others."""
    path = folder / "people.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "subset", "group"])
        for video in sorted(data.resolve().glob("*/*.avi")):
            person = video.stem.partition("_")[0]
            subset = {**dict.fromkeys(job.train_people, "train"), **dict.fromkeys(job.test_people, "test")}
            if person in subset:
                writer.writerow([video, video.parent.name, subset[person], person])
    return path


def right(result: EvalResult, *, whole_names: bool = False) -> dict[str, int]:
    """Whether each video's best score is its label's: file name, or name with its class folder -> 1 or 0."""
    names = {a.video.name if whole_names else Path(a.video.name).stem: a.is_right for a in result.answers}
    return {name: int(is_right) for name, is_right in names.items()}


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def tables(rows: dict[str, Row]) -> str:
    """Everything there is so far, as Markdown."""
    parts = []
    tested = [row for row in rows.values() if row["part"] == "test"]
    trained = [row for row in tested if row["recipe"] == recipe_of(row["method"]) and row["seed"] == SEEDS[0]]
    if trained:
        parts.append("### People left out\n\n" + people_table(trained, list(METHODS)))
    whole = [row for row in tested if row["recipe"] == "base" and row["method"] != PROBE]
    if whole:
        parts.append("### People left out, 16 epochs of all patches\n\n" + people_table(whole, list(METHODS)))
    ordered = [row for row in rows.values() if row["part"] == "motions"]
    if ordered:
        lines = [
            "| scheme | recipe | in order | shuffled | GFLOPs | processor minutes |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['method']} | {r['recipe']} | {r['top1']:.3f} | {r['shuffled_top1']:.3f} "
            f"| {r['flops'] / 1e9:.2f} | {r['cpu_minutes']:.1f} |"
            for r in sorted(ordered, key=lambda row: (-list(RECIPES).index(row["recipe"]), row["method"]))
        ]
        parts.append("### Motions\n\n" + "\n".join(lines))
    tried: dict[str, list[Row]] = {}
    for row in rows.values():
        if row["part"] == "select":
            tried.setdefault(f"{row['method']}, {row['recipe']}", []).append(row)
    if tried:
        lines = [
            "| scheme, recipe | folds | inner top-1 | inner loss | inner top-1, 8 views |",
            "|---|---|---|---|---|",
        ]
        for name, group in sorted(tried.items(), key=lambda item: -mean(item[1], "top1")):
            figures = " | ".join(f"{mean(group, key):.3f}" for key in ("top1", "loss", "views_top1"))
            lines.append(f"| {name} | {len(group)} | {figures} |")
        parts.append("### Selection on inner people\n\n" + "\n".join(lines))
    recipes = dict(selected(rows, range(1, len(FOLDS) + 1))[:FINALISTS])
    final = [row for row in tested if recipes.get(row["method"]) == row["recipe"]]
    if len(final) > len(recipes) * len(FOLDS):
        parts.append("### Selected, several seeds\n\n" + people_table(final, list(recipes)))
    names = sorted({row["part"] for row in rows.values() if row["recipe"] == "set"})
    parts += [
        f"### {name}\n\n" + set_table([r for r in rows.values() if r["part"] == name]) for name in names
    ]
    return "\n\n".join(parts)


def set_table(rows: Sequence[Row]) -> str:
    """A line per recipe on one set: means over folds, intervals over groups, paired with the preset's same clips."""
    lines = [
        "| recipe | runs | top-1 | 95 % | minus preset | 95 % | mean class | shuffled | trainable | processor minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = [row for row in rows if row["seed"] == SEEDS[0]]
    preset = {(r["fold"], clip): right for r in first if r["method"] == "preset finetune"
              for clip, right in r["right"].items()}  # fmt: skip
    for method in SETS:
        own = [row for row in rows if row["method"] == method]
        answers: dict[str, list[float]] = {}
        paired: dict[str, list[float]] = {}
        for row in own:
            for clip, right in row["right"].items():
                answers.setdefault(row["groups"][clip], []).append(right)
                if (row["fold"], clip) in preset and row["seed"] == SEEDS[0]:
                    paired.setdefault(row["groups"][clip], []).append(right - preset[row["fold"], clip])
        if not own:
            continue
        low, high = interval(answers)
        cells = ["", ""]
        if paired and method != "preset finetune":
            below, above = interval(paired)
            values = [value for group in paired.values() for value in group]
            cells = [f"{sum(values) / len(values):+.3f}", f"{below:+.3f} … {above:+.3f}"]
        figures = (
            f"{mean(own, 'class_accuracy'):.3f} | {mean(own, 'shuffled_top1'):.3f} | {own[0]['trainable']:,}"
        )
        lines.append(
            f"| {method} | {len(own)} | {mean(own, 'top1'):.3f} | {low:.3f} … {high:.3f} | {cells[0]} | {cells[1]} "
            f"| {figures} | {mean(own, 'cpu_minutes'):.1f} |"
        )
    return "\n".join(lines)


def people_table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """A line per method: accuracy over all clips scored, intervals over people, difference to the baseline."""
    lines = [
        "| method | clips | top-1 | 95 % | minus joint | 95 % | trainable | GFLOPs | processor minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    baseline = by_person([row for row in rows if row["method"] == BASELINE])
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        persons = by_person(own)
        low, high = interval(persons)
        cells = ["", ""]
        common = {p: [a - b for a, b in zip(persons[p], baseline[p], strict=True)]
                  for p in persons if p in baseline and len(persons[p]) == len(baseline[p])}  # fmt: skip
        if method != BASELINE and common:
            values = [value for person in common.values() for value in person]
            below, above = interval(common)
            cells = [f"{sum(values) / len(values):+.3f}", f"{below:+.3f} … {above:+.3f}"]
        clips = [value for person in persons.values() for value in person]
        lines.append(
            f"| {method} | {len(clips)} | {sum(clips) / len(clips):.3f} | {low:.3f} … {high:.3f} | {cells[0]} "
            f"| {cells[1]} | {own[0]['trainable']:,} | {own[0]['flops'] / 1e9:.1f} | {mean(own, 'cpu_minutes'):.1f} |"
        )
    return "\n".join(lines)


def by_person(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Answers of each person's clips, in the order of seeds and clips: person -> 1 or 0."""
    persons: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        for clip, answer in sorted(row["right"].items()):
            persons.setdefault(clip.partition("_")[0], []).append(float(answer))
    return persons


def interval(persons: dict[str, list[float]]) -> tuple[float, float]:
    """95 % of the mean over clips when people are drawn anew with replacement (percentiles, fixed seed)."""
    draw = random.Random(0)
    groups = list(persons.values())
    means = []
    for _ in range(RESAMPLES):
        drawn = [draw.choice(groups) for _ in groups]
        means.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    means.sort()
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def read_rows(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # else: killed while it was written
    return {row["key"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of Weizmann's ten classes")
    parser.add_argument("--weights", type=Path, help="folder of a pretrained ViT")
    parser.add_argument("--sets", type=Path, help="folder of data sets with fold1.csv to fold3.csv")
    parser.add_argument("--output", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--only", default="", help="make only runs whose key contains this text")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's, to see whether all runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mixed-precision", default="no", help="what all runs compute in: no or bf16")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    options = parser.parse_args()
    if not options.table and (options.weights is None or (options.data or options.sets) is None):
        parser.error("--weights and --data or --sets are needed, except with --table")
    torch.set_num_threads(options.threads)
    os.nice(0 if options.table else options.nice)
    while not options.table:
        rows = read_rows(options.output)
        every = [] if options.data is None else jobs(rows)
        wanted = itertools.chain(every, [] if options.sets is None else set_jobs(options.sets))
        job = next((j for j in wanted if j.key not in rows and options.only in j.key), None)
        if job is None:
            break
        print(job.key, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as name:
            try:
                row = run(job, options, Path(name))
            except Interrupted as error:
                sys.exit(error.exit_code)  # the run is made again from its start
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  top-1 {row['top1']:.3f}, {row['minutes']:.1f} minutes", file=sys.stderr, flush=True)
    print(tables(read_rows(options.output)))


if __name__ == "__main__":
    main()
