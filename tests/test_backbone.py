"""Training that starts from a model of tvit."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_clips, make_pretrained, run

import tvit_cli
from tvit_cli.engine.train.build import build
from tvit_cli.errors import CheckpointError, ModelError, SettingsError
from tvit_cli.files import sha256
from tvit_cli.model.folder import load_card, save_model
from tvit_cli.model.pretrained import load_pretrained, read_config, resolve_weights
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.train import TrainSettings

SHAPE: dict[str, Any] = {
    "frame_size": 32, "patch_size": 8, "n_frames": 4, "tubelet_size": 2, "width": 16, "depth": 2, "num_heads": 2,
}  # fmt: skip
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def trained(folder, **shape):
    """A model folder, and the model in it: its parameters are random numbers, none of them at a start value."""
    config = ViTConfig(num_classes=2, **{**SHAPE, **shape})
    model = TemporalViT(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    card = ModelCard(
        tvit_version=tvit_cli.__version__,
        labels=("a", "b"),
        model=config.to_dict(),
        preprocessing=Preprocessing(
            n_frames=config.n_frames, frame_size=config.frame_size, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
        ),
        weights_sha256="",
    )
    save_model(folder, model.state_dict(), card)
    return model


def started(folder, **shape):
    source = resolve_weights(str(folder))
    settings = {**{key: SHAPE[key] for key in ("frame_size", "n_frames", "tubelet_size")}, **shape}
    config = read_config(source).vit_config(num_classes=3, **settings)
    model = build_model(config, seed=0, from_scratch=False).eval()
    return model, load_pretrained(model, source)


@torch.no_grad()
def features(model, *, n_frames=4, size=32):
    return model.features(torch.randn(2, n_frames, 3, size, size, generator=torch.Generator().manual_seed(2)))


def rewritten(folder, **tensors):
    """Other tensors in a model folder, with their hash on the card; None leaves one out."""
    state = load_file(folder / "model.safetensors") | tensors
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors"
    )
    card = load_card(folder).model_copy(update={"weights_sha256": sha256(folder / "model.safetensors")})
    (folder / "card.json").write_text(card.model_dump_json())


@pytest.mark.parametrize("attention", ["joint", "divided", "factorized"])
def test_same_scheme_starts_with_the_features_of_the_trained_model(tmp_path, attention):
    before = trained(tmp_path / "m", attention=attention, pool="attentive")
    model, report = started(tmp_path / "m", attention=attention, pool="attentive")
    assert torch.equal(features(model), features(before))
    assert report.new == report.unused == ("classifier.weight", "classifier.bias")
    assert model.classifier.out_features == 3


def test_other_frame_sizes_and_clip_lengths_keep_the_trained_features(tmp_path):
    before = trained(tmp_path / "m")
    model, report = started(tmp_path / "m", frame_size=48, n_frames=8)
    theirs, ours = (features(each, n_frames=8, size=48) for each in (before, model))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert set(report.notes) == {
        "positions interpolated from 4 x 4 to 6 x 6 patches",
        "temporal embedding interpolated from 2 to 4 times",
    }


def test_tubelets_start_on_their_central_frame_or_are_refused(tmp_path):
    before = trained(tmp_path / "m", tubelet_size=1, n_frames=2)
    model, _ = started(tmp_path / "m")
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.features(clips), before.features(clips[:, 1::2]), **CLOSE)
    trained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"tubelets are of 2 frames.*Give --tubelet-size 2\."):
        started(tmp_path / "m", tubelet_size=1)


def test_other_scheme_takes_image_weights_and_starts_the_rest_anew(tmp_path):
    before = trained(tmp_path / "m", attention="divided")
    model, report = started(tmp_path / "m", attention="joint")
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)
    assert not model.temporal.embedding.any()  # type: ignore[operator]
    assert "temporal.embedding" in report.new
    assert "blocks.0.temporal.attention.q.weight" in report.unused
    model, report = started(tmp_path / "m", attention="factorized")
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)


def test_temporal_weights_of_another_kind_start_anew_or_as_copies(tmp_path):
    before = trained(tmp_path / "m", temporal_index="token")
    model, report = started(tmp_path / "m")
    assert torch.equal(model.norm.weight, before.norm.weight)
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")
    before = trained(tmp_path / "m")
    model, _ = started(tmp_path / "m", attention="divided")
    assert torch.equal(model.blocks[0].temporal.attention.q.weight, before.blocks[0].attention.q.weight)


def test_normalisation_hash_and_half_precision_come_from_the_folder(tmp_path):
    trained(tmp_path / "m")
    config = read_config(resolve_weights(str(tmp_path / "m")))
    assert (config.mean, config.std, config.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 32)
    assert config.sha256 == sha256(tmp_path / "m" / "model.safetensors")
    before = trained(tmp_path / "m")
    rewritten(tmp_path / "m", **{name: tensor.half() for name, tensor in before.state_dict().items()})
    model, report = started(tmp_path / "m")
    assert report.notes == ("weights converted from torch.float16 to torch.float32",)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    torch.testing.assert_close(features(model), features(before), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("norm.bias", None, "norm.bias is missing"),
        ("extra", torch.zeros(1), "extra is unexpected"),
        ("norm.bias", torch.zeros(3), r"norm.bias has the shape \(3,\), not \(16,\).* their card.json"),
        ("norm.bias", torch.full((16,), float("nan")), "norm.bias holds NaN"),
        ("classifier.bias", torch.zeros(2, dtype=torch.int8), "Use weights that are not quantised"),
    ],
)
def test_tensors_that_are_not_the_cards_are_refused(tmp_path, name, tensor, sentence):
    trained(tmp_path / "m")
    rewritten(tmp_path / "m", **{name: tensor})
    with pytest.raises(ModelError, match=sentence):
        started(tmp_path / "m")


def test_changed_weights_and_impossible_cards_are_refused(tmp_path):
    trained(tmp_path / "m")
    trained(tmp_path / "n", n_frames=8)
    (tmp_path / "n" / "model.safetensors").replace(tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match="the weights are not those of the card beside them"):
        started(tmp_path / "m")
    trained(tmp_path / "m")
    card = load_card(tmp_path / "m")
    (tmp_path / "m" / "card.json").write_text(
        card.model_copy(update={"model": card.model | {"width": 15}}).model_dump_json()
    )
    with pytest.raises(ModelError, match=r"card.json: model: width 15 is not a multiple of num_heads 2"):
        started(tmp_path / "m")


def test_a_training_goes_on_from_the_model_folder_of_another(tmp_path):
    clips, how = make_clips(tmp_path / "colours", groups=4), {"working_directory": tmp_path, "epochs": 1}
    first = run(
        path_to_data=str(clips), hf_model_name=None, width=16, depth=1, num_heads=2, train="all", **how
    )
    second = run(path_to_data=str(clips), hf_model_name=str(first.model), train="classifier", **how)
    base = load_card(second.model).base
    assert base is not None
    assert (base.name, base.sha256) == (str(first.model), load_card(first.model).weights_sha256)
    assert resolve_weights(str(first.run)).folder == first.model  # a run stands for its model, as elsewhere
    before, after = (load_file(result.model / "model.safetensors") for result in (first, second))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["classifier.bias", "classifier.weight"]


def test_what_a_training_leaves_random_or_unseen_is_said_before_it_begins(tmp_path):
    weights = make_pretrained(tmp_path / "vit")
    shape = {"width": 16, "depth": 1, "num_heads": 2}

    def warned(**how):
        notes = []
        build(TrainSettings(img_size=32, **how), labels=("a", "b", "c"), report=notes.append)
        return [note.text for note in notes if note.level == "warning"]

    no_file = warned(hf_model_name=str(weights))
    assert len(no_file) == 1 and "no preprocessor_config.json" in no_file[0]
    (weights / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert warned(hf_model_name=None, **shape) == warned(hf_model_name=str(weights)) == []
    assert "stay random" in warned(hf_model_name=None, train="lora", **shape)[0]
    assert warned(hf_model_name=str(weights), train="last-1") == []
    assert "cannot know the order" in warned(hf_model_name=str(weights), train="classifier")[0]
    assert warned(hf_model_name=str(weights), train="classifier", attention="space", pool="attentive") == []
    ignored = "No adapter is attached: no effect of --lora-rank-pattern, --lora-bias."
    assert warned(hf_model_name=str(weights), train="all", lora_bias="all", lora_rank_pattern={"q": 3}) == [
        ignored
    ]


def test_a_run_goes_on_when_its_weights_have_moved_and_not_with_others(tmp_path):
    data, weights = make_clips(tmp_path / "colours", groups=4), make_pretrained(tmp_path / "vit")
    how = {"path_to_data": str(data), "working_directory": tmp_path / "runs", "epochs": 2}
    first = run(hf_model_name=str(weights), experiment_name="a", **how)
    moved = weights.rename(tmp_path / "moved")
    checkpoint = sorted((first.run / "checkpoints").glob("step-*"))[0]
    again = run(hf_model_name=str(moved), resume_from_checkpoint=str(checkpoint), **how)
    assert load_card(again.model).weights_sha256 == load_card(first.model).weights_sha256
    (moved / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(
        CheckpointError, match=r"--hf-model-name: .*\n  base mean: 0\.485,.* -> 0\.5,0\.5,0\.5\n"
    ):
        run(hf_model_name=str(moved), resume_from_checkpoint=str(checkpoint), **how)
    (moved / "preprocessor_config.json").unlink()
    rewritten_weights = load_file(moved / "model.safetensors")
    rewritten_weights["layernorm.bias"] += 1
    save_file(rewritten_weights, moved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"--hf-model-name: .*\n  base weights: "):
        run(hf_model_name=str(moved), resume_from_checkpoint=str(checkpoint), **how)


def test_an_experiment_is_not_overwritten_with_weights_that_lie_in_it(tmp_path):
    how = {"path_to_data": str(make_clips(tmp_path / "colours", groups=4))}
    how |= {"working_directory": tmp_path / "runs", "epochs": 1, "experiment_name": "a"}
    first = run(hf_model_name=None, width=16, depth=1, num_heads=2, **how)
    with pytest.raises(ModelError, match="not a valid name of a hub repository"):
        run(hf_model_name="x" * 300, overwrite=True, **how)
    for base in (first.model, first.run):
        with pytest.raises(SettingsError, match=r"--overwrite: .*a holds the weights to start from"):
            run(hf_model_name=str(base), overwrite=True, **how)
    assert load_card(first.model)
