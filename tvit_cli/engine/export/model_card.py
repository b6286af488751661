"""The README.md of an export: model, metrics, provenance, usage."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from tvit_cli.engine.evaluate.files import METRICS_FILE, read_metrics
from tvit_cli.engine.export.formats import FRAMES, PIXELS, Format, Job
from tvit_cli.engine.export.parity import Parity
from tvit_cli.errors import shorten
from tvit_cli.model.folder import PARITY_FILE
from tvit_cli.settings.card import ModelCard, Preprocessing

README_FILE = "README.md"
SHOWN_METRICS = ("video_top1", "video_top5", "mean_class_accuracy", "macro_f1", "calibration_error", "videos")
NO_METRICS = "Not measured: no validation subset, and `tvit eval` has not been run.\n"
FRAMES_TEXT = "decoded frames, uint8 (B, T, H, W, 3) of any size, any number of clips,"
INSIDE = f"`model.{{suffix}}` takes {FRAMES_TEXT} and returns probabilities."
OUTSIDE = (
    f"`preprocessing.{{suffix}}` turns {FRAMES_TEXT} into the input of `model.{{suffix}}`; it returns logits."
)


def readme(job: Job, form: Format, parity: Parity) -> str:
    """README.md: metadata for the Hugging Face hub, usage, metrics, parity, provenance."""
    card, settings = job.card, job.settings
    header = f"library_name: {form.library}\npipeline_tag: video-classification\n"
    header += "tags:\n- tvit\n- video-classification\n"
    if card.base is not None and "/" in card.base.name:  # a name on the hub, not a folder's
        header += f"base_model: {card.base.name}\n"
    if card.base is not None and card.base.licence:
        licence, _, name = card.base.licence.partition(" (")  # other (dinov3-license)
        header += f"license: {licence}\n" + (f"license_name: {name.rstrip(')')}\n" if name else "")
    inside = settings.with_preprocessing
    page = resources.files("tvit_cli.engine.export") / "use" / f"{settings.format}.md"
    usage = Template(page.read_text(encoding="utf-8")).substitute(
        inputs=(INSIDE if inside else OUTSIDE).format(suffix=form.suffix),
        preprocess="" if inside else form.preprocess,
        input=FRAMES if inside else PIXELS,
    )
    subsets = {
        "val": {name.removeprefix("val_"): value for name, value in card.metrics.items()}
    }  # in training
    for path in sorted(job.trained.run.glob(f"eval/*/{METRICS_FILE}")):
        subsets[path.parent.name] = read_metrics(path.parent)
    metrics = [
        (subset, name, f"{values[name]:.0f}" if name == "videos" else f"{values[name]:.4f}")
        for subset, values in subsets.items()
        for name in SHOWN_METRICS
        if name in values
    ]
    quantised = " Its weights are int8." if settings.int8 else ""
    parts = [
        f"---\n{header}---\n",
        f"# {job.trained.run.resolve().name} ({settings.format})\n\nA temporal Vision Transformer that classifies "
        f"videos into {len(card.labels)} classes: {shorten(card.labels, most=12)}. "
        f"Trained with tvit {card.tvit_version}.\n",
        f"## Usage\n\n{usage}",
        f"## Input\n\n{_input(card.preprocessing)}",
        f"## Metrics\n\n{_table(('subset', 'metric', 'value'), metrics) if metrics else NO_METRICS}",
        f"## Parity\n\nOn {parity.videos} clips ({parity.clips}), from the video file to the logits: largest "
        f"difference from the trained model {parity.max_logit_difference:.2g}, top-1 agreement "
        f"{parity.top1_agreement:.3f}.{quantised} `{PARITY_FILE}` has the details and the hash of every file.\n",
        f"## Provenance\n\n{_table(('item', 'value'), _provenance(card))}",
    ]
    return "\n".join(parts)


def _input(facts: Preprocessing) -> str:
    grid = "" if facts.frame_grid is None else f" (of {facts.frame_grid} evenly spaced ones)"
    size, to, crops = facts.frame_size, facts.scale_to, facts.resize == "crop"
    how = f"the short side scaled to {to}" if crops else f"the whole frame scaled to {to} x {to}"
    how += " pixels"
    if crops or to > size:
        how += f" and {size} x {size} cropped from the centre"
    mean, std = (", ".join(map("{:g}".format, values)) for values in (facts.mean, facts.std))
    where = f"the middle one of each of {facts.n_frames} equal shares of the video"
    if facts.clip_seconds is not None:
        where = f"evenly spaced over {facts.clip_seconds:g} s in the middle of the video"
    return (
        f"{facts.n_frames} frames{grid}, {where}, in RGB; {how} (bilinear, antialiased, in 8 bits); divided by "
        f"255, then normalised with mean {mean} and standard deviation {std}.\n"
    )


def _provenance(card: ModelCard) -> list[tuple[str, str]]:
    settings = card.settings
    base = "none, trained from scratch"
    if card.base is not None:
        base = card.base.name + (f", revision {card.base.revision}" if card.base.revision else "")
        base += f", sha256 `{card.base.sha256}`" if card.base.sha256 else ""
        base += f", licence {card.base.licence}" if card.base.licence else ""
    shape = ("attention", "pool", "width", "depth", "num_heads", "patch_size", "tubelet_size", "n_frames")
    adapter = ("lora_rank", "lora_alpha") if settings.get("train") == "lora" else ()
    training = ("train", *adapter, "epochs", "learning_rate", "per_gpu_batch_size", "seed")
    return [
        ("weights", f"sha256 `{card.weights_sha256}`"),
        ("pretrained weights", base),
        ("data", Path(str(settings.get("path_to_data", "unknown"))).name),
        ("network", ", ".join(f"{key} {card.model[key]}" for key in shape if key in card.model)),
        ("training", ", ".join(f"{key} {settings[key]}" for key in training if key in settings)),
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)
