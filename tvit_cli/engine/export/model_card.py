"""The README.md of an export: model, metrics, provenance, usage."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from tvit_cli.data.layout import listed
from tvit_cli.engine.evaluate.files import METRICS_FILE, read_metrics
from tvit_cli.engine.export.formats import FRAMES, PIXELS, Format, Job
from tvit_cli.engine.export.parity import Parity
from tvit_cli.model.folder import PARITY_FILE
from tvit_cli.settings.card import ModelCard

README_FILE = "README.md"
SHOWN_METRICS = ("video_top1", "video_top5", "mean_class_accuracy", "macro_f1", "calibration_error", "videos")
NO_METRICS = "Not measured: no validation subset, and `tvit eval` has not been run.\n"
INSIDE = (
    "`{model}` takes frames as they are decoded, uint8 (B, T, H, W, 3) of any size, any number of clips, and gives "
    "scores."
)
OUTSIDE = (
    "`{preprocessing}` turns frames as they are decoded, uint8 (B, T, H, W, 3) of any size, into what `{model}` "
    "takes, which gives logits; any number of clips."
)


def readme(job: Job, form: Format, parity: Parity) -> str:
    """README.md: a header that the Hugging Face hub reads, then the model in words and numbers."""
    card, settings = job.card, job.settings
    metrics = _metrics(job)
    title = f"{job.run.resolve().name} ({settings.format})"
    parts = [
        _header(card, form),
        f"# {title}\n\nA temporal Vision Transformer that tells {len(card.labels)} classes of videos apart: "
        f"{listed(card.labels)}. Trained with tvit {card.tvit_version}.\n",
        f"## Use\n\n{_use(job, form)}",
        f"## Input\n\n{_input(card)}",
        f"## How good\n\n{_table(('subset', 'metric', 'value'), metrics) if metrics else NO_METRICS}",
        f"## The same answers\n\n{_proof(parity, int8=settings.int8)}",
        f"## Where it came from\n\n{_table(('what', 'value'), _provenance(card))}",
    ]
    return "\n".join(parts)


def _header(card: ModelCard, form: Format) -> str:
    lines = [
        "---",
        f"library_name: {form.library}",
        "pipeline_tag: video-classification",
        "tags:",
        "- tvit",
        "- video-classification",
    ]
    if card.base is not None and "/" in card.base.name:  # a folder has no more than its own name here
        lines.append(f"base_model: {card.base.name}")
    return "\n".join([*lines, "---", ""])


def _use(job: Job, form: Format) -> str:
    """How to label a video with the export, from the file `use/<format>.md`."""
    name, inside = job.settings.format, job.settings.with_preprocessing
    text = (resources.files("tvit_cli.engine.export") / "use" / f"{name}.md").read_text(encoding="utf-8")
    names = {graph: f"{graph}.{form.suffix}" for graph in ("model", "preprocessing")}
    return Template(text).substitute(
        inputs=(INSIDE if inside else OUTSIDE).format(**names),
        preprocess="" if inside else form.preprocess,
        input=FRAMES if inside else PIXELS,
    )


def _input(card: ModelCard) -> str:
    facts = card.preprocessing
    grid = "" if facts.frame_grid is None else f" (of {facts.frame_grid} evenly spaced ones)"
    size = f"{facts.frame_size} x {facts.frame_size}"
    how = (
        f"the short side scaled to {facts.scale_to} pixels"
        if facts.resize == "crop"
        else f"the whole frame scaled to {facts.scale_to} x {facts.scale_to} pixels"
    )
    if facts.resize == "crop" or facts.scale_to > facts.frame_size:
        how += f" and {size} cut from the centre"
    return (
        f"{facts.n_frames} frames{grid}, the middle one of each of {facts.n_frames} equal shares of the video, in "
        f"RGB; {how} (bilinear, antialiased, in 8 bits); divided by 255, then normalised with mean "
        f"{_numbers(facts.mean)} and standard deviation {_numbers(facts.std)}.\n"
    )


def _metrics(job: Job) -> list[tuple[str, str, str]]:
    """Subset, name and value: of the validation during training, then of every evaluation of the run."""
    card = job.trained.card
    subsets = {"val": {name.removeprefix("val_"): value for name, value in card.metrics.items()}}
    for path in sorted(job.run.glob(f"eval/*/{METRICS_FILE}")):
        subsets[path.parent.name] = read_metrics(path.parent)
    return [
        (subset, name, f"{values[name]:.0f}" if name == "videos" else f"{values[name]:.4f}")
        for subset, values in subsets.items()
        for name in SHOWN_METRICS
        if name in values
    ]


def _proof(parity: Parity, *, int8: bool) -> str:
    cost = " Its weights have 8 bits; this is what they cost." if int8 else ""
    return (
        f"On {parity.videos} clips ({parity.clips}), from the video file to the logits: largest difference from "
        f"the trained model {parity.max_logit_difference:.2g}, top-1 agreement {parity.top1_agreement:.3f}.{cost} "
        f"`{PARITY_FILE}` has the details and the hash of every file.\n"
    )


def _provenance(card: ModelCard) -> list[tuple[str, str]]:
    told = card.settings
    base = "none, trained from scratch"
    if card.base is not None:
        base = card.base.name + (f", revision {card.base.revision}" if card.base.revision else "")
        base += f", sha256 `{card.base.sha256}`" if card.base.sha256 else ""
    rows = [
        ("weights", f"sha256 `{card.weights_sha256}`"),
        ("pretrained weights", base),
        ("data", Path(str(told.get("path_to_data", "unknown"))).name),
    ]
    shape = ("attention", "pool", "width", "depth", "num_heads", "patch_size", "tubelet_size", "n_frames")
    rows.append(("network", ", ".join(f"{key} {card.model[key]}" for key in shape if key in card.model)))
    adapter = ("lora_rank", "lora_alpha") if told.get("train") == "lora" else ()
    trained = ("train", *adapter, "epochs", "learning_rate", "per_gpu_batch_size", "seed")
    rows.append(("training", ", ".join(f"{key} {told[key]}" for key in trained if key in told)))
    return rows


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return (
        "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines)
        + "\n"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
