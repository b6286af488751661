"""Published video classifiers, as transformers saves them, loaded as a TemporalViT with a model card."""

from __future__ import annotations

import tvit_cli
from tvit_cli.model.families import FAMILIES, Config
from tvit_cli.model.folder import CONFIG_FILE, check_clips, empty_model
from tvit_cli.model.pretrained import load_pretrained
from tvit_cli.model.pretrained_config import (
    PretrainedConfig,
    own_pool,
    preprocessor,
    read_config,
    whole_number,
)
from tvit_cli.model.reference import ReferenceModel, load_reference, named_labels
from tvit_cli.model.weights import WeightsSource
from tvit_cli.portable.config import FIRST, ViTConfig
from tvit_cli.settings.card import BaseWeights, ModelCard, Preprocessing


def load_published(source: WeightsSource) -> ReferenceModel:
    """A classifier that tvit did not train, ready to predict (`eval()`), in float32 on the CPU.

    Its logits equal those of transformers. Frames, size and normalisation are those of the weights. Raises
    ModelError for weights without a classifier, for one of another size than its labels, and as `load_pretrained`
    and `load_reference`.
    """
    written = source.read_json(CONFIG_FILE)
    family = FAMILIES.get(str(written.get("model_type")))
    if family is None or "num_frames" not in family.defaults:
        return load_reference(source)
    stored = {name.removeprefix(family.prefix): tensor for name, tensor in source.tensors.items()}
    head = next((name for name in ("classifier", "head") if f"{name}.weight" in stored), None)
    if head is None:
        problem = "a video ViT without a classifier (classifier.weight is missing)"
        raise source.error(f"{problem}. Train one: tvit train --hf-model-name {source.name}")
    classes = len(stored[f"{head}.weight"])
    named = written.get("id2label")
    if isinstance(named, dict) and len(named) != classes:
        problem = f"{head}.weight has {classes} classes, id2label in {CONFIG_FILE} names {len(named)}"
        raise source.error(f"{problem}. Correct id2label, or fetch both again.")
    labels, notes = named_labels(source, written, classes), []
    labels_are_guessed = labels is None
    if labels is None:
        labels = tuple(f"class {n}" for n in range(classes))
        advice = f'"id2label" in a {CONFIG_FILE} beside the weights names them.'
        notes.append(f"The weights do not name their {classes} classes: they are numbered. {advice}")
    own = read_config(source)
    base = BaseWeights(**{key: getattr(own, key) for key in BaseWeights.model_fields})
    if base.terms:
        notes.append(f"{source.name}: {base.terms}.")
    try:
        config = _network(own, len(labels))
        preprocessing = _preprocessing(source, own, config)
        check_clips(preprocessing, config)
    except ValueError as error:
        raise source.error(f"{error}. Correct the {CONFIG_FILE} beside the weights.") from error
    model = empty_model(source.folder / CONFIG_FILE, config, source.tensors).to_empty(device="cpu")
    report = load_pretrained(model, source, classifier=head)
    assert not report.new, report.new
    card = ModelCard(
        tvit_version=tvit_cli.__version__,
        labels=labels,
        model=config.to_dict(),
        preprocessing=preprocessing,
        base=base,
        weights_sha256=source.sha256,
    )
    return ReferenceModel(model.eval(), card, labels_are_guessed, (*own.notes, *notes))


def _network(own: PretrainedConfig, n_classes: int) -> ViTConfig:
    """The pooling is that of transformers' classifier: VideoMAE's without `fc_norm` reads the first patch."""
    pool = own_pool(own.network) if own.pool_depth is None else "attentive"
    if pool == "mean" and own.network["norm"] == "tokens":
        pool = FIRST
    return own.vit_config(num_classes=n_classes, pool=pool)


def _preprocessing(source: WeightsSource, own: PretrainedConfig, config: ViTConfig) -> Preprocessing:
    """Resizing as in the processor's file: of the short side before a centre crop, or of both sides."""
    written, _ = preprocessor(source)
    size = written.get("size")
    sides: Config = size if isinstance(size, dict) else {"shortest_edge": size or config.frame_size}
    key = "shortest_edge" if "shortest_edge" in sides else "height"
    scale_to = config.frame_size
    if key in sides and written.get("do_resize", True) and written.get("do_center_crop", True):
        scale_to = max(scale_to, whole_number(source, sides, key))
    return Preprocessing(
        n_frames=config.n_frames,
        clip_seconds=own.clip_seconds,
        frame_size=config.frame_size,
        resize="crop" if key == "shortest_edge" else "squash",
        scale_to=scale_to,
        mean=own.mean,
        std=own.std,
    )
