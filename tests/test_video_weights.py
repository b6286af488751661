"""Video ViTs against transformers, at step 0: VideoMAE, VideoMAE V2, V-JEPA 2, ViViT."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import records, settings

import tvit_cli
from tvit_cli.engine.train.build import build
from tvit_cli.engine.train.origin import settings_beneath
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import ModelError, TvitError
from tvit_cli.model.lora import LoraSpec, set_trainable, trainable_tensors
from tvit_cli.model.pretrained import load_pretrained, read_config, resolve_weights
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.settings.base import load
from tvit_cli.settings.train import TrainSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers warns of its optional dependencies
    import transformers

SHAPE = {
    "image_size": 32, "patch_size": 8, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
DECODER = {
    "decoder_num_hidden_layers": 1, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}  # fmt: skip
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def videomae(**changes):
    config = transformers.VideoMAEConfig(**SHAPE, use_mean_pooling=True, **changes)
    return transformers.VideoMAEForVideoClassification(config)


def videomae_pretrained(**changes):
    config = transformers.VideoMAEConfig(**SHAPE, **DECODER, use_mean_pooling=False, **changes)
    return transformers.VideoMAEForPreTraining(config)


def vjepa2(kind=transformers.VJEPA2Model, size=32, **changes):
    shape = {
        "crop_size": size, "patch_size": 8, "frames_per_clip": 4, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "mlp_ratio": 2.0, "num_pooler_layers": 1, "pred_hidden_size": 48,
        "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1, **changes,
    }  # fmt: skip
    return kind(transformers.VJEPA2Config(**shape))


def vivit(**changes):
    shape = {key: value for key, value in SHAPE.items() if key != "patch_size"}
    config = transformers.VivitConfig(**shape, tubelet_size=[2, 8, 8], **changes)
    return transformers.VivitForVideoClassification(config)


MODELS = {
    "VideoMAE, fine-tuned": videomae,
    "VideoMAE, pretrained": videomae_pretrained,
    "VideoMAE without biases": lambda: videomae(qv_bias=False),
    "V-JEPA 2": vjepa2,
    "V-JEPA 2, classifier": lambda: vjepa2(transformers.VJEPA2ForVideoClassification),
    "ViViT": vivit,
}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    def save(name):
        model = randomised(MODELS[name]())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / "weights")
        return model, tmp_path / "weights"

    return save


def loaded(folder, **shape):
    source = resolve_weights(str(folder))
    config = read_config(source).vit_config(num_classes=3, **shape)
    model = build_model(config, seed=0, from_scratch=False).eval()
    return model, load_pretrained(model, source)


def clips(n_frames=4, size=32):
    return torch.randn(2, n_frames, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features_of(model, frames, **how):
    """Features that a classifier reads: of pretrained encoders the mean of the tokens."""
    if hasattr(model, "fc_norm"):
        return model.fc_norm(model.videomae(frames).last_hidden_state.mean(1))
    if hasattr(model, "vivit"):
        return model.vivit(frames, **how).last_hidden_state[:, 0]
    if hasattr(model, "videomae"):
        return model.videomae(frames).last_hidden_state.mean(1)
    return getattr(model, "vjepa2", model).get_vision_features(frames).mean(1)


@pytest.mark.parametrize("name", MODELS)
def test_at_step_0_a_clip_gives_the_features_of_the_familys_own_model(name, saved):
    theirs, folder = saved(name)
    model, report = loaded(folder)
    with torch.no_grad():
        features, backwards = model.features(clips()), model.features(clips().flip(1))
    torch.testing.assert_close(features, features_of(theirs, clips()), **CLOSE)
    assert (features - backwards).abs().max() > 0.01  # it does depend on the order of frames
    assert report.new == ("classifier.weight", "classifier.bias")
    weights = model.classifier.weight.data = torch.randn(3, features.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(model(clips()), F.linear(features_of(theirs, clips()), weights), **CLOSE)


V2_VALUES = {
    "img_size": 32, "patch_size": 8, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5,
    "qkv_bias": True, "init_values": 0.0, "use_learnable_pos_emb": False, "tubelet_size": 2, "num_frames": 4,
    "use_mean_pooling": True, "cos_attn": False,
}  # fmt: skip
V2_CONFIG = {"model_type": "VideoMAEv2_Base", "auto_map": {"AutoModel": "modeling_videomaev2.VideoMAEv2"}}


def as_videomae_v2(folder):
    """Gives the saved weights of a fine-tuned VideoMAE the names and the config of VideoMAE V2."""
    tensors = {}
    names = {
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.attention": "attn",
    }  # fmt: skip
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = name.removeprefix("videomae.").replace("encoder.layer", "blocks")
        own = own.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        for ours, v2 in names.items():
            own = own.replace(ours, v2)
        tensors[f"model.{own}" if own.startswith(("blocks", "patch")) else own] = tensor
    for block in ("model.blocks.0.attn", "model.blocks.1.attn"):
        parts = [tensors.pop(f"{block}.{part}.weight") for part in ("query", "key", "value")]
        tensors[f"{block}.qkv.weight"] = torch.cat(parts)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(V2_CONFIG | {"model_config": V2_VALUES}))
    return folder


def with_eps(videomae, eps):
    videomae.fc_norm.eps = eps
    for layer in videomae.videomae.encoder.layer:
        layer.layernorm_before.eps = layer.layernorm_after.eps = eps


def test_videomae_v2_is_read_without_its_remote_code(saved):
    theirs, folder = saved("VideoMAE, fine-tuned")
    with_eps(theirs, 1e-6)
    as_videomae_v2(folder)

    model, report = loaded(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.features(clips()), features_of(theirs, clips()), **CLOSE)
    assert report.new == ("classifier.weight", "classifier.bias")


WRONG: dict[str, tuple[object, str]] = {
    "other attention": (V2_VALUES | {"cos_attn": True}, "cos_attn is True, which tvit does not support"),
    "text": (V2_VALUES | {"embed_dim": "32"}, "embed_dim is '32'; it must be a whole number"),
    "more blocks": (V2_VALUES | {"depth": 3}, r"blocks\.2\.attn\.qkv\.weight is missing"),
    "no heads": (V2_VALUES | {"num_heads": 0}, "num_heads is 0; it must be a whole number"),
    "heads": (V2_VALUES | {"num_heads": 5}, "width 32 is not a multiple of num_heads 5"),
    "NaN": (V2_VALUES | {"mlp_ratio": float("nan")}, "mlp_ratio is nan; it must be a number above 0"),
    "ratio 0": (V2_VALUES | {"mlp_ratio": 0}, "mlp_ratio is 0; it must be a number above 0"),
    "learned positions": (
        V2_VALUES | {"use_learnable_pos_emb": True},
        "use_learnable_pos_emb is True, which",
    ),
    "LayerScale": (V2_VALUES | {"init_values": 0.1}, "init_values is 0.1, which tvit does not support"),
    "tubelets": (V2_VALUES | {"tubelet_size": 4}, r"the shape \(32, 3, 2, 8, 8\), not \(32, 12, 8, 8\)"),
    "a list": ([V2_VALUES], r"model_config\.embed_dim is None; it must be a whole number"),
    "null": (None, r"model_config\.embed_dim is None; it must be a whole number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_model_config_of_videomae_v2_is_refused(case, saved):
    values, problem = WRONG[case]
    folder = as_videomae_v2(saved("VideoMAE, fine-tuned")[1])
    (folder / "config.json").write_text(json.dumps(V2_CONFIG | {"model_config": values}))
    with pytest.raises((ModelError, ValueError), match=problem):
        loaded(folder)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (
            False,
            r"someone/net: model\.safetensors missing\. The network is remote code, which tvit does not run",
        ),
        (True, "its model_type is 'internvideo_next', remote code that tvit does not run; tvit reads vit, "),
    ],
    ids=["no weights", "weights"],
)
def test_a_repository_of_remote_code_alone_is_refused(weights, problem, tmp_path, monkeypatch):
    config = {
        "model_type": "internvideo_next",
        "auto_map": {"AutoModel": "modeling_net.Net"},
        "model_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_net.py").write_text("raise SystemExit")
    if weights:
        save_file({"model.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("tvit_cli.model.weights.snapshot_download", lambda name, **how: str(tmp_path))
    monkeypatch.setattr("tvit_cli.model.weights.HfApi", Hub)
    with pytest.raises(ModelError, match=problem) as caught:
        read_config(resolve_weights("someone/net"))
    assert caught.value.exit_code == 2 and "AutoModel" not in str(caught.value)


def test_rotary_positions_take_any_size_as_transformers_does(saved):
    theirs, folder = saved("V-JEPA 2")
    larger = vjepa2(size=48).eval()
    larger.load_state_dict(theirs.state_dict())
    model, _ = loaded(folder, n_frames=2, frame_size=48)
    with torch.no_grad():
        features = model.features(clips(2, 48))
    torch.testing.assert_close(features, features_of(larger, clips(2, 48)), **CLOSE)


@pytest.mark.parametrize("name", ["VideoMAE, pretrained", "ViViT"])
def test_other_clips_than_the_models_own_are_taken_as_if_loaded_for_them(name, saved):
    # transformers has no interpolation for VideoMAE, and that for ViViT takes all its tokens for one square.
    _, folder = saved(name)
    native, other = loaded(folder)[0], loaded(folder, n_frames=2, frame_size=48)[0]
    with torch.no_grad():
        torch.testing.assert_close(native.features(clips(2, 48)), other.features(clips(2, 48)), **CLOSE)


@pytest.mark.parametrize("name", ["VideoMAE, fine-tuned", "ViViT"])
def test_positions_are_bicubic_in_space_and_linear_in_time(name, saved):
    _, folder = saved(name)
    own, resized = (
        loaded(folder, **shape)[0].positions.joint for shape in ({}, {"n_frames": 6, "frame_size": 48})
    )
    assert own.shape == (1, 2, 16, 32) and resized.shape == (1, 3, 36, 32)
    pictures = own[0].transpose(1, 2).unflatten(2, (4, 4))  # (T', D, 4, 4)
    space = F.interpolate(pictures, (6, 6), mode="bicubic").flatten(2).transpose(1, 2)  # (T', P, D)
    torch.testing.assert_close(resized[0], torch.stack([space[0], space.mean(0), space[1]]), **CLOSE)


def test_videomaes_positions_are_pairs_of_sine_and_cosine(saved):
    _, folder = saved("VideoMAE, fine-tuned")
    place = torch.arange(32).view(-1, 1) / 10000 ** (torch.arange(0, 32, 2) / 32)
    expected = torch.stack([place.sin(), place.cos()], dim=2).flatten(1)
    joint = loaded(folder)[0].positions.joint
    torch.testing.assert_close(joint.flatten(0, 2), expected, **CLOSE)


def test_tokens_keep_their_rotary_positions_when_others_are_dropped(saved):
    _, folder = saved("V-JEPA 2")
    source = resolve_weights(str(folder))
    model = build_model(
        read_config(source).vit_config(num_classes=3), seed=0, from_scratch=False, token_drop=0.5
    )
    load_pretrained(model, source)
    rotations = []
    model.run_block = lambda block, tokens, rotation, **how: (
        rotations.append(rotation) or block(tokens, rotation=rotation, **how)
    )
    whole, _ = model.eval().positions(torch.zeros(2, 2, 16, 64), (4, 4))
    model(clips())
    every = rotations.pop()[1, 0, 0]  # sines, (T'*P, D/A)
    model.train()(clips())
    kept = rotations[-1][1]  # (B, 1, half, D/A)
    assert whole.shape[2] == 32 and kept.shape == (2, 1, 16, 16)
    rows = (kept[:, 0].unsqueeze(2) == every).all(3)  # (B, half, T'*P)
    assert rows.sum(2).eq(1).all() and rows.sum(1).max() == 1  # each is the position of one token
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        (
            "VideoMAE, fine-tuned",
            {"tubelet_size": 1},
            "tubelet_size 1: the weights have tubelets of 2 frames",
        ),
        (
            "VideoMAE, fine-tuned",
            {"n_frames": 15},
            "n_frames 15 is not a multiple of tubelet_size 2; use 14 or 16",
        ),
        (
            "ViViT",
            {"attention": "divided"},
            "attention divided: a network with joint positions attends over all",
        ),
        ("V-JEPA 2", {"attention": "factorized"}, "attention factorized: a network with rotary positions"),
        (
            "V-JEPA 2",
            {"pool": "class"},
            "pool class needs a class token, and this network has none; use pool mean",
        ),
    ],
)
def test_shapes_that_the_weights_forbid_are_refused(name, shape, problem, saved):
    with pytest.raises(ValueError, match=problem):
        loaded(saved(name)[1], **shape)


@pytest.mark.parametrize(
    ("name", "config", "problem"),
    [
        ("V-JEPA 2", {"num_attention_heads": 24}, "width 64 is not a multiple of num_heads 24"),
        ("V-JEPA 2", {"num_attention_heads": 16}, "rotary positions need heads of 6 or more channels"),
        ("V-JEPA 2", {"mlp_ratio": "4"}, "mlp_ratio is '4'; it must be"),
        ("ViViT", {"num_frames": 8}, r"positions of the shape \(1, 33, 32\), not \(1, 65, 32\)"),
        ("ViViT", {"tubelet_size": [2, 8, 16]}, r"patch_size is \[8, 16\]"),
        (
            "VideoMAE, fine-tuned",
            {"tubelet_size": 4},
            r"has the shape \(32, 3, 2, 8, 8\), not \(32, 12, 8, 8\)",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(name, config, problem, saved):
    _, folder = saved(name)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises((ModelError, ValueError), match=problem):
        loaded(folder)


def test_a_missing_query_bias_is_named(saved):
    _, folder = saved("VideoMAE, fine-tuned")
    tensors = load_file(folder / "model.safetensors")
    del tensors["videomae.encoder.layer.1.attention.attention.q_bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.attention\.q_bias is missing"):
        loaded(folder)


@pytest.mark.parametrize(
    ("name", "config", "settings", "problem"),
    [
        ("VideoMAE, fine-tuned", {}, {"n_frames": 15}, "--n-frames 15: .* multiple of --tubelet-size 2"),
        ("V-JEPA 2", {"num_attention_heads": 24}, {}, "width 64 is not a multiple of num_heads 24"),
        ("V-JEPA 2", {"num_attention_heads": 16}, {}, "rotary positions need heads of 6 or more channels"),
        ("VideoMAE, fine-tuned", {"model_type": "VideoMAEv2_Base"}, {}, "embed_dim is None"),
    ],
)
def test_training_refuses_bad_video_weights_before_it_writes(
    name, config, settings, problem, saved, inputs, tmp_path
):
    _, weights = saved(name)
    path = weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    where = {"hf_model_name": str(weights), "working_directory": tmp_path / "runs", "device": "cpu"}
    with pytest.raises(TvitError, match=problem) as caught:
        tvit_cli.train(path_to_data=inputs["path_to_data"], **where, **settings, quiet=True)
    assert caught.value.exit_code == 2 and not (tmp_path / "runs").exists()


def test_adapters_spare_the_patches_whose_tubelets_come_with_the_weights(saved):
    model, _ = loaded(saved("V-JEPA 2")[1])
    set_trainable(model, "lora", LoraSpec(2, 2, 0.0, False, "none", ("q",), ()), seed=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".q." in name or name.startswith("classifier") for name in trained)


@pytest.mark.parametrize(("dropout", "early"), [(0.0, True), (0.1, False)])
def test_pooling_before_the_last_layer_changes_no_gradient(dropout, early):
    config = ViTConfig(
        num_classes=3, n_frames=4, frame_size=32, patch_size=8, width=32, depth=2, num_heads=4, tubelet_size=2,
        class_token=False, pool="mean", positions="joint", norm="pooled",
    )  # fmt: skip
    model = build_model(config, seed=0, from_scratch=True)
    assert model.pools_in_last
    set_trainable(
        model, "lora", LoraSpec(2, 2, dropout, False, "none", ("q", "fc2"), (), init="gaussian"), seed=0
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    assert model.pools_in_last is early  # dropout acts on each token

    def step():
        logits = model.eval()(clips())
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return [logits, *torch.autograd.grad(logits.square().sum(), trained)]

    if early:
        results = step()
        model.pools_in_last = False
        torch.testing.assert_close(results, step(), **CLOSE)


def test_vivits_offset_and_scale_are_part_of_mean_and_std(saved):
    _, folder = saved("ViViT")
    processor = transformers.VivitImageProcessor(do_resize=False, do_center_crop=False)
    frame = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(processor([frame.numpy()]).pixel_values[0][0])
    for write in (lambda: None, lambda: processor.save_pretrained(folder)):
        write()
        config = read_config(resolve_weights(str(folder)))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        torch.testing.assert_close((frame / 255 - mean) / std, expected.view(3, 32, 32), **CLOSE)


def test_a_video_preprocessor_config_is_read(saved):
    _, folder = saved("V-JEPA 2")
    path = folder / "video_preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std, config.notes) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ())


def train_and_export(data, weights, folder, formats, *, expected_pool="mean", **how):
    """Trains with the clips that the weights decide, resumes from the first checkpoint, and exports."""
    how |= {
        "path_to_data": str(data),
        "hf_model_name": str(weights),
        "working_directory": folder,
        "num_workers": 0,
    }
    how |= {"device": "cpu", "quiet": True, "token_drop": 0.25}
    whole = tvit_cli.train(experiment_name="mine", **how)
    settings = json.loads((whole.run / "settings.json").read_text())
    own = {"n_frames": 4, "tubelet_size": 2, "img_size": 32, "pool": how.get("pool", expected_pool)}
    assert {key: settings[key] for key in own} == own
    losses = [record["train_loss"] for record in records(whole)]
    assert losses[-1] < losses[0]
    state = (whole.model / "model.safetensors").read_bytes()
    shutil.rmtree(whole.model)
    checkpoint = min(path.name for path in (whole.run / "checkpoints").glob("step-*"))
    for path in (whole.run / "checkpoints").glob("step-*"):
        if path.name != checkpoint:
            shutil.rmtree(path)
    again = tvit_cli.train(resume_from_checkpoint="latest", experiment_name="mine", **how)
    assert (again.model / "model.safetensors").read_bytes() == state
    for name in formats:
        result = tvit_cli.export(model=whole.run, format=name, output=folder / name, quiet=True)
        assert result.parity.max_logit_difference < 1e-5
        assert "license: cc-by-nc-4.0" in (folder / name / "README.md").read_text()
    return whole


@pytest.mark.parametrize("name", ["VideoMAE, pretrained", "V-JEPA 2", "V-JEPA 2, classifier"])
def test_a_video_vit_trains_resumes_bit_for_bit_and_exports(name, saved, inputs, tmp_path):
    _, weights = saved(name)
    (weights / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags:\n- video\n---\n# Weights\n")
    formats = {"V-JEPA 2": ("huggingface", "adapter"), "V-JEPA 2, classifier": ("onnx",)}
    formats = formats.get(name, ("torch", "safetensors"))
    how = {"epochs": 3, "learning_rate": 0.01, "gradient_checkpointing": True}
    how |= {"pool": "attentive", "learning_rate": 0.003} if name.endswith("classifier") else {}
    run = train_and_export(inputs["path_to_data"], weights, tmp_path / "runs", formats, **how)
    again = tvit_cli.train(
        from_=str(run.run),
        epochs=1,
        working_directory=tmp_path / "runs",
        quiet=True,
        num_workers=0,
        device="cpu",
    )
    assert json.loads((again.run / "settings.json").read_text())["tubelet_size"] == 2
    if name == "V-JEPA 2":
        where = {"model": str(tmp_path / "runs" / "huggingface"), "trust_remote_code": True}
        classify = transformers.pipeline("video-classification", **where)
        video = str(next(Path(inputs["path_to_data"]).rglob("*.avi")))
        theirs = {answer["label"]: answer["score"] for answer in classify(video)}
        labels = dict(tvit_cli.predict(video, model=run.run, quiet=True).predictions[0].labels)
        assert theirs == pytest.approx(labels, abs=1e-5)


@pytest.mark.real
@pytest.mark.parametrize("name", ["VideoMAE, pretrained", "V-JEPA 2"])
def test_a_tiny_video_vit_learns_real_clips_and_exports_to_every_format(name, saved, real_data, tmp_path):
    _, weights = saved(name)
    (weights / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    how = {"epochs": 3, "learning_rate": 0.01, "per_gpu_batch_size": 16}
    how |= {"group_pattern": "^([a-z]+)_", "test_groups": "daria"}
    formats = ("torch", "safetensors", "onnx", "huggingface", "adapter")
    train_and_export(real_data / "weizmann", weights, tmp_path / "runs", formats, **how)


def test_a_probe_trains_resumes_bit_for_bit_and_exports(saved, inputs, tmp_path):
    _, weights = saved("V-JEPA 2")
    (weights / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    how = {"epochs": 2, "learning_rate": 0.01, "train": "probe"}
    run = train_and_export(
        inputs["path_to_data"], weights, tmp_path / "runs", ("huggingface",), expected_pool="attentive", **how
    )
    before, after = load_file(weights / "model.safetensors"), load_file(run.model / "model.safetensors")
    assert torch.equal(after["norm.weight"], before["encoder.layernorm.weight"])
    assert after["pool.query"].abs().min() > 0  # it starts at zero


@pytest.mark.parametrize("name", ["V-JEPA 2", "V-JEPA 2, classifier", "image ViT"])
def test_a_probe_is_a_cross_attention_block_or_the_weights_pooler(name, saved, inputs):
    folder = inputs["hf_model_name"] if name == "image ViT" else saved(name)[1]
    frozen = settings(
        hf_model_name=str(folder), train="probe", lora_rank=0, tubelet_size=1 + (name != "image ViT")
    )
    model = build(frozen, labels=("a", "b"), report=lambda event: None).model.train()
    assert len(model.pool.layers) == int(name == "V-JEPA 2, classifier")
    parts = {key.partition(".")[0] for key in trainable_tensors(model)}
    assert parts == {"pool", "classifier"}
    seen = []
    for part in (model.blocks[-1], model.pool):
        part.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model(clips()).sum().backward()
    assert seen == [False, True]  # no backpropagation through the encoder
    with torch.no_grad():
        model.pool.query.zero_()
        tokens = model.encode(clips())  # (B, 1, N, D)
    start = model.pool.norm1(tokens).mean(2)
    is_mean = torch.allclose(model.pool(tokens), start, atol=1e-5)
    assert is_mean == (name != "V-JEPA 2, classifier")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"pool": "mean"}, "--train probe: it trains an attentive pooler, not --pool mean. Leave --pool out"),
        ({"hf_model_name": None}, "--train probe: an encoder with random weights has no features. Give"),
        ({"drop_path": 0.1}, "--drop-path 0.1: --train probe trains no block. Leave one of them out"),
    ],
)
def test_settings_that_contradict_a_probe_are_refused(how, problem):
    with pytest.raises(ValueError, match=problem):
        settings(train="probe", **how)


@pytest.mark.real
@pytest.mark.parametrize("name", ["VideoMAE, pretrained", "V-JEPA 2"])
def test_video_vits_train_on_people_walking_and_waving(name, saved, real_data, tmp_path):
    _, weights = saved(name)
    (weights / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    how = {
        "group_pattern": "^([a-z]+)_",
        "test_groups": "daria,eli,moshe",
        "val_groups": "ido,ira",
        "epochs": 3,
    }
    how |= {"learning_rate": 0.01}
    train_and_export(real_data / "weizmann", weights, tmp_path / "runs", ("huggingface", "adapter"), **how)


def test_licences_with_conditions_are_said_at_the_start(saved, inputs, tmp_path):
    _, weights = saved("V-JEPA 2")
    own = "other\nlicense_name: dinov3-license"
    for licence, said in (
        ("cc-by-nc-4.0", "licence cc-by-nc-4.0: not for commercial use"),
        ("mit", None),
        (own, "licence other (dinov3-license): its terms hold for a model trained from it, too"),
    ):
        (weights / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        events = []
        how = {"path_to_data": inputs["path_to_data"], "hf_model_name": str(weights), "dry_run": True}
        tvit_cli.train(**how, working_directory=tmp_path, num_workers=0, device="cpu", on_event=events.append)
        texts = [event.text for event in events if getattr(event, "level", "") == "warning"]
        texts = [text for text in texts if "licence" in text]
        assert len(texts) == bool(said) and all(said in text for text in texts)


@pytest.mark.parametrize("name", ["V-JEPA 2", "VideoMAE, pretrained"])
def test_the_video_preset_leaves_size_and_pooling_to_the_weights(name, saved, inputs, tmp_path):
    how = {"hf_model_name": str(saved(name)[1]), "working_directory": tmp_path, "device": "cpu"}
    own = load(TrainSettings, flags=how, environ={}, preset="video", beneath=settings_beneath).settings
    assert (own.n_frames, own.tubelet_size, own.img_size, own.pool) == (16, 2, 32, "mean")
    if name == "V-JEPA 2":
        how |= {"path_to_data": inputs["path_to_data"], "epochs": 1, "num_workers": 0}
        plan = tvit_cli.train(**how, global_batch_size=8, preset="video", dry_run=True, quiet=True)
        assert plan.micro_batch == 8


class Hub:
    """Stands in for huggingface_hub.HfApi: a repository of pickles with two pull requests."""

    def list_repo_refs(self, name, include_pull_requests):
        refs = [SimpleNamespace(ref=f"refs/pr/{n}") for n in (1, 3)]
        return SimpleNamespace(pull_requests=refs)

    def list_repo_files(self, name, revision):
        return ["config.json", "model.safetensors" if revision == "refs/pr/3" else "pytorch_model.bin"]


def test_a_repository_of_pickles_names_its_revision_with_safetensors(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vivit"}')
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("tvit_cli.model.weights.snapshot_download", download)
    monkeypatch.setattr("tvit_cli.model.weights.HfApi", Hub)
    with pytest.raises(ModelError, match=r"safetensors: google/vivit-b-16x2@refs/pr/3$"):
        resolve_weights("google/vivit-b-16x2")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert resolve_weights("google/vivit-b-16x2@refs/pr/3").files == (tmp_path / "model.safetensors",)
    assert asked == [("google/vivit-b-16x2", None), ("google/vivit-b-16x2", "refs/pr/3")]


CLASSIFIERS = {
    "VideoMAE": videomae,
    "VideoMAE, first patch": lambda **how: transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(**SHAPE, use_mean_pooling=False, **how)
    ),
    "V-JEPA 2": lambda **how: vjepa2(
        transformers.VJEPA2ForVideoClassification, **{"num_pooler_layers": 2, **how}
    ),
    "V-JEPA 2, shallow": lambda **how: CLASSIFIERS["V-JEPA 2"](num_pooler_layers=0, **how),
    "ViViT": vivit,
}
COLOURS = ("blue", "green", "red")


def published(name, folder, labels=COLOURS):
    """A classifier as its authors publish it, with its processor."""
    model = randomised(CLASSIFIERS[name](id2label=dict(enumerate(labels))))
    size = {"size": {"shortest_edge": 36 if name.startswith("V-JEPA") else 40}, "crop_size": 32}
    processor = transformers.VivitImageProcessor if name == "ViViT" else transformers.VideoMAEImageProcessor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        processor(**size).save_pretrained(folder)
    if name.startswith("V-JEPA"):  # its processor needs torchvision
        (folder / "preprocessor_config.json").rename(folder / "video_preprocessor_config.json")
    return model


def opened(folder):
    return open_trained(folder, working_directory=Path("runs"), device=torch.device("cpu"))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_published_classifier_gives_transformers_logits_and_labels(name, tmp_path, inputs):
    theirs = published(name, tmp_path / "weights")
    trained = opened(tmp_path / "weights")
    with torch.no_grad():
        torch.testing.assert_close(trained.model(clips()), theirs(clips()).logits, **CLOSE)
    asked = trained.card.preprocessing
    sizes = (asked.n_frames, asked.frame_size, asked.resize, asked.scale_to)
    assert sizes == (4, 32, "crop", 36 if name.startswith("V-JEPA") else 40)
    assert asked.mean == ((0.75 if name == "ViViT" else 0.5),) * 3
    video = next(Path(inputs["path_to_data"]).rglob("*.avi"))
    found = tvit_cli.predict(video, model=tmp_path / "weights", quiet=True).predictions[0]
    assert sorted(label for label, _ in found.labels) == sorted(COLOURS)


def test_a_classifier_of_videomae_v2_is_read(saved):
    theirs, folder = saved("VideoMAE, fine-tuned")
    with_eps(theirs, 1e-6)
    as_videomae_v2(folder)
    head = {f"model.head.{leaf}": getattr(theirs.classifier, leaf).data for leaf in ("weight", "bias")}
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors")
    trained = opened(folder)
    assert trained.card.labels == ("class 0", "class 1") and trained.labels_are_guessed
    with torch.no_grad():
        torch.testing.assert_close(trained.model(clips()), theirs(clips()).logits, **CLOSE)


def test_a_published_classifier_is_evaluated_and_exported(tmp_path, inputs):
    published("V-JEPA 2", tmp_path / "weights")
    how = {"model": tmp_path / "weights", "working_directory": tmp_path, "quiet": True}
    result = tvit_cli.evaluate(path_to_data=inputs["path_to_data"], num_workers=0, device="cpu", **how)
    assert result.labels == COLOURS
    exported = tvit_cli.export(format="safetensors", output=tmp_path / "export", **how)
    assert exported.parity.max_logit_difference < 1e-5
    assert tvit_cli.load_model(tmp_path / "export", device="cpu").labels == COLOURS


def test_classes_that_a_published_classifier_does_not_name_are_numbered(tmp_path):
    published("ViViT", tmp_path / "weights", ("LABEL_0", "LABEL_1", "LABEL_2"))
    trained = opened(tmp_path / "weights")
    assert trained.card.labels == ("class 0", "class 1", "class 2")
    assert trained.named_by(COLOURS).card.labels == COLOURS
    assert any("do not name their 3 classes" in note for note in trained.notes)


@pytest.mark.parametrize(
    ("name", "config", "problem"),
    [
        ("VideoMAE", {"id2label": {"0": "a", "1": "b"}}, "classifier.weight has 3 classes, .* names 2"),
        ("V-JEPA 2", {"num_pooler_layers": 3}, r"self_attention_layers\.2\.layer_norm1\.weight is missing"),
        ("ViViT", {"num_frames": 5}, "n_frames 5 is not a multiple of tubelet_size 2"),
    ],
)
def test_a_published_classifier_that_is_not_its_configs_is_refused(name, config, problem, tmp_path):
    published(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ModelError, match=problem):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["VideoMAE, pretrained", "V-JEPA 2"])
def test_an_encoder_without_a_classifier_names_the_command_to_train_it(name, saved):
    _, folder = saved(name)
    with pytest.raises(ModelError, match=f"without a classifier .* tvit train --hf-model-name {folder}"):
        opened(folder)


def test_an_attentive_pool_starts_from_the_pooler_of_the_weights(tmp_path):
    theirs = published("V-JEPA 2", tmp_path)
    model, report = loaded(tmp_path, pool="attentive")
    with torch.no_grad():
        features = theirs.pooler(theirs.vjepa2.get_vision_features(clips()))
        torch.testing.assert_close(model.features(clips()), features, **CLOSE)
    assert report.new == ("classifier.weight", "classifier.bias")
    assert not any(name.startswith("pooler.") for name in report.unused)
