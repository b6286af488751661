"""Pretrained weights of every family: equal to transformers at step 0; refusals of bad folders."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tvit_cli
from tvit_cli.errors import ModelError
from tvit_cli.model import weights as weights_module
from tvit_cli.model.families import CLIP_MEAN, FAMILIES
from tvit_cli.model.lora import LoraSpec, merge, set_trainable
from tvit_cli.model.pretrained import load_pretrained, read_config, resolve_weights
from tvit_cli.model.pretrained_config import own_clips
from tvit_cli.portable.config import ATTENTIONS
from tvit_cli.portable.vit import TemporalViT, build_model, resize_grid
from tvit_cli.settings.card import IMAGENET_MEAN, IMAGENET_STD

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers warns of its optional dependencies
    import transformers

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def hugging_face_config(**changes):
    values = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-5, "attn_implementation": "eager",
    }  # fmt: skip
    return transformers.ViTConfig(**{**values, **changes})


def saved(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def randomised(model):
    """Numbers large enough that a wrong position, bias or norm shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def image_vit():
    return randomised(transformers.ViTModel(hugging_face_config()))


@pytest.fixture
def folder(image_vit, tmp_path):
    saved(image_vit, tmp_path / "weights")
    return tmp_path / "weights"


def loaded(path, **shape):
    source = resolve_weights(str(path))
    config = read_config(source).vit_config(**{"num_classes": 3, "n_frames": 4, **shape})
    model = build_model(config, seed=0, from_scratch=False).eval()
    return model, load_pretrained(model, source)


def pictures(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def class_token(image_vit, images, **options):
    return image_vit(pixel_values=images, **options).last_hidden_state[:, 0]


@torch.no_grad()
def ours(model, images):
    return model.features(images.unsqueeze(1))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "joint"])
def test_frame_wise_scheme_at_step_0_averages_the_image_vits_class_tokens(image_vit, folder, attention):
    model, _ = loaded(folder, attention=attention)
    frames = [pictures(32) + t for t in range(5)]
    expected = torch.stack([class_token(image_vit, images) for images in frames]).mean(0)
    with torch.no_grad():
        features = model.features(torch.stack(frames, dim=1))
    torch.testing.assert_close(features, expected, **CLOSE)


def test_divided_temporal_attention_starts_as_copy_of_spatial(folder):
    model, report = loaded(folder, attention="divided")
    for block in model.blocks:
        assert torch.equal(block.temporal.norm.weight, block.norm1.weight)
        for layer in ("q", "k", "v", "proj"):
            copy, original = (getattr(part.attention, layer) for part in (block.temporal, block))
            assert torch.equal(copy.weight, original.weight) and torch.equal(copy.bias, original.bias)
            assert copy.weight.data_ptr() != original.weight.data_ptr()
    gates = [f"blocks.{n}.temporal.scale.gate" for n in (0, 1)]
    assert report.new == ("temporal.embedding", *gates, "classifier.weight", "classifier.bias")
    assert "temporal attention starts as a copy of spatial attention" in report.notes


@pytest.mark.parametrize("size", [16, 40, 56, 96])
def test_other_frame_sizes_give_what_interpolated_positions_give(image_vit, folder, size):
    model, report = loaded(folder, frame_size=size)
    images = pictures(size)
    expected = class_token(image_vit, images, interpolate_pos_encoding=True)
    torch.testing.assert_close(ours(model, images), expected, **CLOSE)
    assert f"positions interpolated from 4 x 4 to {size // 8} x {size // 8} patches" in report.notes


@pytest.mark.parametrize(("tubelet_size", "centre"), [(2, 2), (3, 2), (4, 3)])
def test_a_tubelet_starts_as_the_image_vit_on_its_central_frame(image_vit, folder, tubelet_size, centre):
    model, report = loaded(folder, tubelet_size=tubelet_size, n_frames=12)
    frames = [pictures(32) + t for t in range(tubelet_size)]
    with torch.no_grad():
        features = model.features(torch.stack(frames, dim=1))
    torch.testing.assert_close(features, class_token(image_vit, frames[centre - 1]), **CLOSE)
    assert f"patch embedding: on frame {centre} of each tubelet of {tubelet_size}" in report.notes


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"qkv_bias": False}, {"layer_norm_eps": 0.1}],
    ids=str,
)
def test_the_network_is_read_from_the_config(tmp_path, changes):
    image_vit = randomised(transformers.ViTModel(hugging_face_config(**changes)))
    assert_equal_features(loaded(saved(image_vit, tmp_path))[0], image_vit)


def test_the_weights_of_masked_modelling_load_without_its_decoder(tmp_path):
    masked = transformers.ViTForMaskedImageModeling(hugging_face_config(encoder_stride=8)).eval()
    saved(masked, tmp_path)
    _, report = loaded(tmp_path)
    assert sorted(report.unused) == ["decoder.0.bias", "decoder.0.weight", "embeddings.mask_token"]


def test_the_report_counts_what_matched_in_one_file_or_in_shards(folder, image_vit, tmp_path):
    _, report = loaded(folder)
    assert report.matched == 4 + 2 * 16 + 2
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")
    assert sorted(report.unused) == ["pooler.dense.bias", "pooler.dense.weight"]
    note = "no preprocessor_config.json: frames are normalised with ImageNet's mean and std; put it beside weights that have others"
    assert report.notes == (note,)
    saved(image_vit, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 1
    one, _ = loaded(folder)
    many, _ = loaded(tmp_path / "sharded")
    assert all(torch.equal(tensor, many.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_type_are_converted_to_the_models(folder, dtype):
    original = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    model, report = loaded(folder)
    stored = original["encoder.layer.1.output.dense.weight"].to(dtype).float()
    assert torch.equal(model.blocks[1].mlp.fc2.weight, stored)
    assert model.norm.weight.dtype == torch.float32
    assert f"weights converted from {dtype} to torch.float32" in report.notes


def test_hashes_are_of_all_files_and_defaults_those_of_hugging_face(image_vit, folder, tmp_path):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert read_config(resolve_weights(str(folder))).sha256 == digest
    saved(image_vit, tmp_path, max_shard_size="20KB")
    before = resolve_weights(str(tmp_path)).sha256
    last = max(tmp_path.glob("model-*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(last).items()}, last)
    assert resolve_weights(str(tmp_path)).sha256 != before
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": [384, 384]}))
    config = read_config(resolve_weights(str(folder)))
    default = transformers.ViTConfig()
    assert [config.network[k] for k in ("width", "depth", "num_heads")] == [768, 12, 12]
    assert config.network["norm_eps"] == default.layer_norm_eps
    assert (config.network["mlp_width"], config.image_size) == (default.intermediate_size, 384)


def test_normalisation_is_of_the_preprocessor_config_or_imagenets(folder):
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std) == (IMAGENET_MEAN, IMAGENET_STD)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}))
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std, config.notes) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), ())
    edit_json(path, do_normalize=False)
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


Spoil = Callable[[Path], object]
INDEX = "model.safetensors.index.json"


def write(name, value):
    return lambda folder: (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def remove(name):
    return lambda folder: (folder / name).unlink()


def config(changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def drop(*names):
    return lambda folder: edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(*names, tensor):
    return lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({n: tensor.clone() for n in names})
    )


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (remove("config.json"), r"config\.json is missing"),
        (remove("model.safetensors"), r"model\.safetensors missing"),
        (truncate, r"model\.safetensors: cannot be read .* may be truncated"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"pickle .*\.save_pretrained\('weights-safetensors'\)",
        ),
        (write("config.json", "{"), "config.json cannot be read"),
        (write("config.json", "[" * 20_000), "config.json cannot be read"),
        (write("config.json", "[]"), "config.json holds no JSON object"),
        *(
            (write("preprocessor_config.json", {"image_mean": mean}), "must be three finite numbers")
            for mean in ([0.5, 0.5], "grey", 0.5, ["a", "b", "c"])
        ),
        *(
            (
                write("preprocessor_config.json", {"image_mean": [0, 0, 0], "image_std": std}),
                "three finite numbers each, the second above 0",
            )
            for std in ([0.5, 0, 0.5], [-1, 1, 1], [0.5, float("nan"), 0.5])
        ),
        *(
            (write(INDEX, {"weight_map": {"layernorm.bias": shard}}), "is no file of this folder")
            for shard in ("../other.safetensors", "/etc/passwd", "a\\b.safetensors")
        ),
        *((write(INDEX, text), f"{INDEX} is no index") for text in ("{", "[]", "{}", '{"weight_map": 1}')),
        (put(*(f"extra.{i}" for i in range(9)), tensor=torch.zeros(1)), r"extra\.3 is unexpected and 5 more"),
        (config({"model_type": "swin"}), "its model_type is 'swin'; tvit reads vit"),
        (
            config({"model_type": None}),
            "its model_type is None; tvit reads vit.* and weights with timm's names",
        ),
        (config({"hidden_act": "mish"}), "hidden_act is 'mish'; tvit supports gelu"),
        (config({"hidden_act": ["gelu"]}), r"hidden_act is \['gelu'\]"),
        (config({"layer_norm_eps": "small"}), "layer_norm_eps is 'small'; it must be a number above 0"),
        (config({"image_size": []}), r"image_size is \[\]; it must be a whole number"),
        (config({"num_channels": 1}), "num_channels is 1; frames of a video have 3"),
        (config({"patch_size": [8, 16]}), r"patch_size is \[8, 16\]; it must be a whole number"),
        (config({"hidden_size": "32"}), "hidden_size is '32'"),
        (drop("layernorm.weight"), "layernorm.weight is missing"),
        (
            drop(*(f"encoder.layer.1.attention.attention.{n}.bias" for n in ("query", "key", "value"))),
            "query.bias is missing; encoder.layer.1.attention.attention.key.bias is missing",
        ),
        (
            put("encoder.layer.2.output.dense.bias", tensor=torch.zeros(32)),
            "encoder.layer.2.output.dense.bias is unexpected",
        ),
        (put("vit.layernorm.bias", tensor=torch.zeros(32)), "layernorm.bias is stored twice"),
        (put("layernorm.bias", tensor=torch.zeros(31)), r"layernorm.bias has the shape \(31,\), not \(32,\)"),
        (put("layernorm.bias", tensor=torch.full((32,), torch.nan)), "layernorm.bias holds NaN or infinite"),
        (put("layernorm.bias", tensor=torch.full((32,), torch.inf)), "layernorm.bias holds NaN or infinite"),
        (put("layernorm.bias", tensor=torch.zeros(32, dtype=torch.int8)), "layernorm.bias is torch.int8"),
        (
            put("layernorm.bias", tensor=torch.zeros(32).to(torch.float8_e4m3fn)),
            "layernorm.bias is torch.float8_e4m3fn",
        ),
        (put("embeddings.position_embeddings", tensor=torch.zeros(1, 16, 32)), "are no square grid"),
        (put("embeddings.position_embeddings", tensor=torch.zeros(0)), "are no square grid"),
    ],
)
def test_spoilt_weights_and_configs_are_refused_with_the_reason(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(ModelError, match=sentence):
        loaded(folder)


@pytest.mark.parametrize("name", ["x" * 300, "./no/such/folder"])
def test_an_impossible_name_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ModelError, match="no such folder, and not a valid name of a hub repository"):
        resolve_weights(name)


def test_a_run_that_has_not_ended_is_no_start_for_another(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ModelError, match="a run without a model"):
        resolve_weights(str(tmp_path))


def test_a_folder_of_runs_is_no_start_for_another_but_each_of_them_is(tmp_path):
    for run in ("mine-s1", "mine-s2"):
        (tmp_path / run / "model").mkdir(parents=True)
        (tmp_path / run / "model" / "card.json").write_text("{}")
    with pytest.raises(ModelError, match=r"a folder of runs \(mine-s1, mine-s2\)\. Name one of them"):
        resolve_weights(str(tmp_path))


def test_a_missing_shard_is_asked_for_and_an_export_named_as_one(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors missing\. .* lists them; fetch"):
        resolve_weights(str(folder))
    (folder / "parity.json").write_text("{}")
    with pytest.raises(ModelError, match="an export of a tvit model for other programs"):
        resolve_weights(str(folder))


def test_weights_are_taken_only_where_their_network_is_known(folder):
    source = resolve_weights(str(folder))
    config = read_config(source).vit_config(num_classes=3, n_frames=8)
    values = {**config.to_dict(), "num_heads": 8}  # the same shapes, other numbers
    with pytest.raises(ModelError, match="num_heads is 4, and 8 in the model"):
        load_pretrained(TemporalViT(type(config).from_dict(values)), source)
    by_file, by_folder = resolve_weights(str(folder / "model.safetensors")), resolve_weights(str(folder))
    assert by_file.sha256 == by_folder.sha256
    assert read_config(by_file).network == read_config(by_folder).network
    assert read_config(by_file).network["width"] == 32
    (folder / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"not a \.safetensors file.*save_pretrained"):
        resolve_weights(str(folder / "weights.bin"))
    (folder / "config.json").unlink()
    said = r"no config\.json beside it names a model_type; tvit reads vit, deit, dinov2"
    with pytest.raises(ModelError, match=said):
        read_config(resolve_weights(str(folder / "model.safetensors")))


def test_a_name_from_the_hub_is_found_in_the_cache(folder, monkeypatch):
    snapshot = folder.rename(folder.parent / "0123abcd")
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(weights_module, "snapshot_download", fetch)
    source = resolve_weights("someone/vit")
    assert (source.name, source.revision) == ("someone/vit", "0123abcd")
    assert read_config(source).revision == "0123abcd"
    assert asked["name"] == "someone/vit"
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])


def test_a_snapshot_in_the_hubs_own_cache_is_read_without_a_network(folder, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--someone--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_weights("someone/vit").revision == "0123abcd"


def test_without_a_network_and_with_nothing_cached_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = r"hub cannot be reached\. Connect once to fetch it, or name a folder"
    with pytest.raises(ModelError, match=said):
        resolve_weights("someone/vit")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, "no such public repository .* hf auth login"),
        (
            huggingface_hub.errors.GatedRepoError,
            "Accept its terms at .*co/someone/vit, then run: hf auth login",
        ),
        (ConnectionResetError, "cannot be fetched from the Hugging Face hub"),
    ],
)
def test_what_the_hub_answers_is_said(monkeypatch, error, sentence):
    def fetch(name, **options):
        raise error.__new__(error, "refused")

    monkeypatch.setattr(weights_module, "snapshot_download", fetch)
    with pytest.raises(ModelError, match=f"someone/vit: .*{sentence}"):
        resolve_weights("someone/vit")


@pytest.mark.real
@pytest.mark.skipif("TVIT_TEST_DATA" not in os.environ, reason="TVIT_TEST_DATA is not set")
def test_real_pretrained_weights_equal_transformers_at_98_pixels():
    folder = Path(os.environ["TVIT_TEST_DATA"]).parent / "weights" / "vit-small-patch14-224"
    model, report = loaded(folder, frame_size=98)
    assert set(report.unused) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image_vit = transformers.ViTModel.from_pretrained(
            folder, dtype=torch.float32, add_pooling_layer=False
        )
    images = pictures(98)
    expected = class_token(image_vit.eval(), images, interpolate_pos_encoding=True)
    torch.testing.assert_close(ours(model, images), expected, **CLOSE)


SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
EAGER = {"attn_implementation": "eager"}


def dinov2(**changes):
    return transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, **EAGER, **changes))


def registers(**changes):
    config = transformers.Dinov2WithRegistersConfig(**SHAPE, **EAGER, num_register_tokens=3, **changes)
    return transformers.Dinov2WithRegistersModel(config)


def clip(**changes):
    config = transformers.CLIPVisionConfig(**SHAPE, **EAGER, intermediate_size=48, **changes)
    return transformers.CLIPVisionModel(config)


def siglip(**changes):
    config = transformers.SiglipVisionConfig(**SHAPE, **EAGER, intermediate_size=48, **changes)
    return transformers.SiglipVisionModel(config)


def dinov3(**changes):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_register_tokens": 3, "layerscale_value": 0.7}
    config = transformers.DINOv3ViTConfig(**{**SHAPE, **EAGER, **shape, **changes})
    return transformers.DINOv3ViTModel(config)


MODELS: dict[str, Callable[[], Any]] = {
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**SHAPE, **EAGER, intermediate_size=48)),
    "dino": lambda: transformers.ViTModel(
        transformers.ViTConfig(**SHAPE, **EAGER, intermediate_size=48), add_pooling_layer=False
    ),
    "dinov2": dinov2,
    "dinov2 with SwiGLU": lambda: dinov2(use_swiglu_ffn=True),
    "dinov2 without biases": lambda: dinov2(qkv_bias=False),
    "dinov2 with registers": registers,
    "clip": clip,
    "clip with GELU": lambda: clip(hidden_act="gelu"),
    "siglip": siglip,
    "dinov3": dinov3,
    "dinov3, huge": lambda: dinov3(use_gated_mlp=True, hidden_act="silu", key_bias=True),
}


@torch.no_grad()
def theirs(model, images):
    kind = type(model).__name__
    interpolate = (
        {} if images.shape[-1] == 32 or "DINOV" in kind.upper() else {"interpolate_pos_encoding": True}
    )
    output = model(pixel_values=images, **interpolate)
    if "Siglip" in kind:
        return output.last_hidden_state.mean(1)
    return output.pooler_output if "CLIP" in kind else output.last_hidden_state[:, 0]


def assert_equal_features(model, image_vit, size=32):
    expected = theirs(image_vit, pictures(size))
    torch.testing.assert_close(ours(model, pictures(size)), expected, atol=1e-5, rtol=1e-4)
    assert (expected - expected[:1]).abs().max() > 0.01  # it does depend on the picture


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [32, 16, 48])
def test_at_step_0_a_frame_gives_the_features_of_the_familys_own_model(name, size, tmp_path):
    image_vit = randomised(MODELS[name]())
    model, report = loaded(saved(image_vit, tmp_path), frame_size=size)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in FAMILIES
    assert_equal_features(model, image_vit, size)
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "joint"])
@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_takes_every_family(name, attention, tmp_path):
    image_vit = randomised(MODELS[name]())
    model, _ = loaded(saved(image_vit, tmp_path), attention=attention)
    frames = torch.stack([pictures(), pictures() + 1], dim=1)
    expected = (theirs(image_vit, pictures()) + theirs(image_vit, pictures() + 1)) / 2
    with torch.no_grad():
        torch.testing.assert_close(model.features(frames), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "family", "unused"),
    [
        (lambda: transformers.ViTForImageClassification(hugging_face_config()), "vit", 2),
        (
            lambda: transformers.DeiTForImageClassificationWithTeacher(
                transformers.DeiTConfig(**SHAPE, intermediate_size=48)
            ),
            "deit",
            4,
        ),
        (lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SHAPE)), "dinov2", 3),
        (
            lambda: transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(**SHAPE, intermediate_size=48)
            ),
            "vision_model",
            1,
        ),
    ],
    ids=["vit", "deit", "dinov2", "clip"],
)
def test_the_weights_of_a_classifier_load_without_its_head(make, family, unused, tmp_path):
    whole = randomised(make())
    model, report = loaded(saved(whole, tmp_path))
    assert_equal_features(model, getattr(whole, family))
    assert len(report.unused) == unused


def test_the_vision_tower_of_a_whole_clip_loads_without_its_text_tower(tmp_path):
    tower = {**SHAPE, "intermediate_size": 48}
    text = {k: v for k, v in tower.items() if k not in ("image_size", "patch_size")}
    config = transformers.CLIPConfig(
        vision_config=tower, text_config={**text, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    )
    whole = randomised(transformers.CLIPModel(config))
    model, report = loaded(saved(whole, tmp_path))
    assert_equal_features(model, whole.vision_model)
    assert all(
        n.startswith("text_") or n in ("visual_projection.weight", "logit_scale") for n in report.unused
    )


@pytest.mark.parametrize("kind", [transformers.SiglipModel, transformers.SiglipForImageClassification])
def test_siglip_loads_without_its_text_tower_and_heads(kind, tmp_path):
    tower = {**SHAPE, "intermediate_size": 48}
    text = {**tower, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "projection_size": 32}
    text = {key: value for key, value in text.items() if key not in ("image_size", "patch_size")}
    whole = randomised(kind(transformers.SiglipConfig(vision_config=tower, text_config=text)))
    model, report = loaded(saved(whole, tmp_path))
    assert_equal_features(model, whole.vision_model)
    beside = ("text_model.", "head.", "logit_scale", "logit_bias", "classifier.")
    assert report.unused and all(name.startswith(beside) for name in report.unused)
    assert own_clips(str(tmp_path)) == {"pool": "mean"}
    config = read_config(resolve_weights(str(tmp_path)))
    assert config.mean == config.std == (0.5, 0.5, 0.5)
    transformers.SiglipImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    assert read_config(resolve_weights(str(tmp_path))).mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("attention", ["joint", "divided"])
def test_dinov3s_tokens_keep_their_positions_when_others_are_dropped(attention, tmp_path):
    saved(randomised(dinov3()), tmp_path)
    source = resolve_weights(str(tmp_path))
    config = read_config(source).vit_config(num_classes=3, n_frames=2, attention=attention)
    model = build_model(config, seed=0, from_scratch=False, token_drop=0.5)
    load_pretrained(model, source)
    frames = torch.stack([pictures(), pictures() + 1], dim=1)
    places = []
    for is_training in (False, True):
        patches = model.patch_embed(frames.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (2, 2))
        tokens, rotation = model.train(is_training).positions(patches, (4, 4))
        tokens, rotation = tokens.flatten(0, 1), rotation.squeeze(2)  # (B*G, N, D), (2, B*G, N, D/A)
        assert (rotation[0, :, :4] == 1).all() and (rotation[1, :, :4] == 0).all()  # class token, registers
        pairs = torch.cat([tokens, rotation[0], rotation[1]], dim=2)[:, 4:]
        places.append({tuple(row) for row in pairs.flatten(0, 1).tolist()})
    assert len(places[0]) == 64 and len(places[1]) == 32 and places[1] < places[0]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"rope_theta": 10000.0}, "rope_theta is 10000.0, which tvit does not support"),
        ({"use_gated_mlp": True}, "hidden_act is 'gated gelu'"),
        ({"num_attention_heads": 16}, "need heads of a multiple of 4 channels, not 2"),
        ({"num_register_tokens": 2}, r"register_tokens has the shape \(1, 3, 32\), not \(1, 2, 32\)"),
    ],
)
def test_a_dinov3_that_is_none_is_refused_with_the_reason(config, problem, tmp_path):
    edit_json(saved(dinov3(), tmp_path) / "config.json", **config)
    with pytest.raises((ModelError, ValueError), match=problem):
        loaded(tmp_path)


def test_dinov3_trains_and_exports_and_its_licence_is_in_each(inputs, tmp_path):
    weights = str(saved(randomised(dinov3(use_gated_mlp=True, hidden_act="silu")), tmp_path / "weights"))
    where = {"working_directory": tmp_path, "num_workers": 0, "device": "cpu", "quiet": True}
    how = {"img_size": 48, "n_frames": 2, "attention": "divided", "epochs": 1, "token_drop": 0.25}
    run = tvit_cli.train(path_to_data=inputs["path_to_data"], hf_model_name=weights, **where, **how)
    assert json.loads((run.model / "card.json").read_text())["base"]["licence"] == "other (dinov3-license)"
    for form in ("safetensors", "onnx"):
        result = tvit_cli.export(model=run.run, format=form, output=tmp_path / form, quiet=True)
        assert result.parity.max_logit_difference < 1e-5
        readme = (tmp_path / form / "README.md").read_text()
        assert "license: other\nlicense_name: dinov3-license\n" in readme


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name", ["dinov3", "dinov3, huge"])
def test_timms_names_of_dinov3_give_the_same(name, biases, tmp_path):
    huge = {"use_gated_mlp": True, "hidden_act": "silu"} if "huge" in name else {}
    image_vit = dinov3(query_bias=biases, value_bias=biases, **huge)
    state = load_file(saved(randomised(image_vit), tmp_path) / "model.safetensors")
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.register_tokens": "reg_token", "layer.": "blocks.",
        "embeddings.patch_embeddings": "patch_embed.proj", "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "gamma_1", "layer_scale2.lambda1": "gamma_2", "mlp.gate_proj": "mlp.fc1_g",
        "mlp.up_proj": "mlp.fc1_x" if "huge" in name else "mlp.fc1", "mlp.down_proj": "mlp.fc2",
    }  # fmt: skip
    timm = {}
    for key, tensor in state.items():
        for theirs, ours_too in names.items():
            key = re.sub(rf"^{re.escape(theirs)}|(?<=\.){re.escape(theirs)}", ours_too, key)
        timm[key] = tensor
    for block in ("blocks.0", "blocks.1"):
        parts = {
            leaf: [timm.pop(f"{block}.attention.{n}_proj.{leaf}", None) for n in "qkv"]
            for leaf in ("weight", "bias")
        }
        timm[f"{block}.attn.qkv.weight"] = torch.cat(parts["weight"])
        if biases:
            timm |= {f"{block}.attn.q_bias": parts["bias"][0], f"{block}.attn.v_bias": parts["bias"][2]}
    timm.pop("embeddings.mask_token")
    save_file(timm, tmp_path / "model.safetensors")
    facts = {"architecture": "vit_small_patch16_dinov3_qkvb", "model_args": {"num_heads": 4}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    for size in (32, 48):
        model, report = loaded(tmp_path, frame_size=size)
        assert_equal_features(model, image_vit, size)
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")
    assert read_config(resolve_weights(str(tmp_path))).licence == "other (dinov3-license)"


def pe_core(folder):
    """Random weights of the Perception Encoder under timm's names, and its class token after timm's eva.py."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "patch_embed.proj.weight": (32, 3, 8, 8)}
    layers = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (48, 32), "mlp.fc2": (32, 48)}
    names = {"norm_pre": (32,), "norm": (32,), "head": (5, 32), "attn_pool.q": (32, 32)}
    names |= {
        f"blocks.{n}.{name}": shape
        for n in (0, 1)
        for name, shape in {**layers, "norm1": (32,), "norm2": (32,)}.items()
    }
    for name, shape in names.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    w = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    save_file(w, folder / "model.safetensors")
    config = {"architecture": "vit_pe_core_base_patch16_224", "model_args": {"num_heads": 4}}
    (folder / "config.json").write_text(json.dumps(config))

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def class_token_of(images):
        n = images.shape[-1] // 8
        patches = F.conv2d(images, w["patch_embed.proj.weight"], stride=8).flatten(2).transpose(1, 2)
        first, table = w["pos_embed"][:, :1], w["pos_embed"][:, 1:]
        table = resize_grid(table, (n, n), antialias=True)
        x = torch.cat([(w["cls_token"] + first).expand(len(images), -1, -1), patches + table], dim=1)
        x = norm("norm_pre", x)
        places = torch.arange(1, n + 1) / n * 4  # from 1, scaled to the weights' own 4 x 4 patches
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        speeds = 10000 ** (-torch.arange(2) / 2)
        angles = torch.cat([columns.reshape(-1, 1) * speeds, rows.reshape(-1, 1) * speeds], dim=1)  # (P, 4)
        turns = torch.polar(torch.ones(n * n + 1, 4), F.pad(angles, (0, 0, 1, 0)))  # the class token's is 1
        for block in ("blocks.0", "blocks.1"):
            q, k, v = (
                linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
                .unflatten(2, (3, 4, 8))
                .permute(2, 0, 3, 1, 4)
            )
            q, k = (
                torch.view_as_real(
                    torch.view_as_complex(h.unflatten(3, (4, 2)).contiguous()) * turns
                ).flatten(3)
                for h in (q, k)
            )
            seen = (q @ k.transpose(2, 3) / 8**0.5).softmax(3) @ v
            x = x + linear(f"{block}.attn.proj", seen.transpose(1, 2).flatten(2))
            x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
        return norm("norm", x)[:, 0]

    return class_token_of


@pytest.mark.parametrize("size", [32, 48])
def test_a_perception_encoder_of_timm_equals_its_formulas(size, tmp_path):
    class_token_of = pe_core(tmp_path)
    expected = class_token_of(pictures(size))
    for attention in ATTENTIONS:
        model, report = loaded(tmp_path, frame_size=size, attention=attention)
        torch.testing.assert_close(ours(model, pictures(size)), expected, **CLOSE)
    assert (expected - expected[:1]).abs().max() > 0.01
    assert set(report.unused) == {
        f"{n}.{leaf}" for n in ("attn_pool.q", "head") for leaf in ("bias", "weight")
    }
    config = read_config(resolve_weights(str(tmp_path)))
    assert (config.mean, config.image_size, config.network["rotary_grid"]) == ((0.5, 0.5, 0.5), 32, 4)


def test_siglip_2_naflex_is_refused_with_the_next_step(tmp_path):
    (saved(siglip(), tmp_path) / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ModelError, match=r"NaFlex.*take one of a fixed size, such as google/siglip2-base"):
        loaded(tmp_path)


def test_clip_towers_load_with_clips_own_normalisation(tmp_path):
    config = read_config(resolve_weights(str(saved(clip(), tmp_path))))
    assert config.mean == CLIP_MEAN
    assert config.notes == (
        "no preprocessor_config.json: frames are normalised with CLIP's mean and std; put it beside weights that have others",
    )
    config = transformers.CLIPConfig(vision_config={**SHAPE, "intermediate_size": 48}, num_labels=2)
    whole = randomised(transformers.CLIPForImageClassification(config))
    model, report = loaded(saved(whole, tmp_path))
    assert_equal_features(model, getattr(whole.vision_model, "vision_model", whole.vision_model))
    assert {"classifier.weight", "classifier.bias"} <= set(report.unused)


def as_timm(image_vit, folder, **config):
    """The weights of a Hugging Face model under timm's names, fused as timm fuses them."""
    saved(image_vit, folder)
    state = load_file(folder / "model.safetensors")
    timm = {}
    fixed = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "reg_token", "embeddings.distillation_token": "dist_token",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "intermediate.dense": "mlp.fc1", "attention.output.dense": "attn.proj",
        "output.dense": "mlp.fc2", "weights_in": "fc1", "weights_out": "fc2", "layernorm": "norm",
    }  # fmt: skip
    for name, tensor in state.items():
        if "attention.attention" in name or "mask_token" in name or "pooler" in name:
            continue
        new = name.replace("encoder.layer.", "blocks.")
        for old, short in fixed.items():
            new = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{short}", new)
        timm[new] = tensor
    for index in range(2):
        prefix = f"encoder.layer.{index}.attention.attention"
        for leaf in ("weight", "bias"):
            parts = [
                state[f"{prefix}.{n}.{leaf}"]
                for n in ("query", "key", "value")
                if f"{prefix}.{n}.{leaf}" in state
            ]
            if parts:
                timm[f"blocks.{index}.attn.qkv.{leaf}"] = torch.cat(parts)
    timm |= {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    save_file(timm, folder / "model.safetensors")
    facts = {"architecture": "vit_tiny", "model_args": {"num_heads": 4}, **config}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    "name", ["deit", "dino", "dinov2", "dinov2 with SwiGLU", "dinov2 without biases", "dinov2 with registers"]
)
def test_timms_names_give_the_same(name, tmp_path):
    image_vit = MODELS[name]()
    image_vit.config.layer_norm_eps = 1e-6  # timm's
    image_vit = randomised(type(image_vit)(image_vit.config))
    model, report = loaded(as_timm(image_vit, tmp_path))
    assert_equal_features(model, image_vit)
    assert report.unused == ("head.bias", "head.weight")
    assert model.config.frame_size == 32


HEADS = r'attention heads is not known for width 32.*"model_args": \{"num_heads": 8\}'
Q_NORM = "blocks.0.attn.q_norm.weight"


@pytest.mark.parametrize(
    ("name", "config", "spoil", "sentence"),
    [
        (
            "dino",
            {"architecture": "vit_base_patch16_rope_224"},
            lambda folder: None,
            "vit_base_patch16_rope_224 has rotary positions",
        ),
        (
            "dino",
            {"architecture": "vit_small_patch16_rope_224"},
            drop("pos_embed"),
            "rope_224 has rotary positions of a kind that tvit does not read. Use a plain ViT, or DINOv3",
        ),
        (
            "dino",
            {"architecture": "eva02_tiny_patch14_224"},
            drop("norm.weight"),
            "eva02.* has rotary positions",
        ),
        (
            "dino",
            {"architecture": "vit_pe_spatial_base_patch16_512"},
            lambda folder: None,
            "rotary positions",
        ),
        (
            "dino",
            {"model_args": {"use_rope": True, "num_heads": 4}},
            lambda folder: None,
            "has rotary positions",
        ),
        ("dinov2", {}, drop("blocks.0.ls1.gamma", "blocks.1.ls1.gamma"), "blocks.0.ls1.gamma is missing"),
        ("dinov2", {}, drop("blocks.0.ls2.gamma", "blocks.1.ls2.gamma"), "blocks.0.ls2.gamma is missing"),
        ("dino", {"model_args": {}}, lambda folder: None, HEADS),
        ("dino", {}, put(Q_NORM, tensor=torch.ones(8)), rf"{Q_NORM} is unexpected.*use a plain ViT"),
    ],
)
def test_timm_weights_of_no_plain_vit_are_refused_by_name(name, config, spoil, sentence, tmp_path):
    folder = as_timm(randomised(MODELS[name]()), tmp_path, **config)
    spoil(folder)
    with pytest.raises(ModelError, match=sentence):
        loaded(folder)


def test_timms_positions_may_leave_out_the_class_token(tmp_path):
    image_vit = registers()
    image_vit.embeddings.position_embeddings.data[:, 0] = 0
    folder = as_timm(randomised(image_vit), tmp_path)
    image_vit.embeddings.position_embeddings.data[:, 0] = 0
    edit_tensors(folder, lambda tensors: tensors.update(pos_embed=tensors["pos_embed"][:, 1:].contiguous()))
    assert_equal_features(loaded(folder)[0], image_vit)


def test_timms_config_and_positions_are_read_as_timm_does(tmp_path):
    half = [0.5, 0.5, 0.5]
    folder = as_timm(MODELS["dino"](), tmp_path, pretrained_cfg={"mean": half, "std": half})
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std, config.notes) == ((0.5,) * 3, (0.5,) * 3, ())
    folder = as_timm(randomised(registers()), tmp_path)
    native = loaded(folder)[0].positions.spatial
    smaller = loaded(folder, frame_size=16)[0].positions.spatial
    assert torch.equal(smaller, resize_grid(native, (2, 2), antialias=True))
    assert not torch.allclose(smaller, resize_grid(native, (2, 2)), atol=1e-3)


def test_a_lone_file_with_timms_names_says_its_shape_itself(tmp_path):
    config = transformers.ViTConfig(
        **{**SHAPE, "hidden_size": 192, "num_attention_heads": 3, "layer_norm_eps": 1e-6},
        intermediate_size=48,
        **EAGER,
    )
    image_vit = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    folder = as_timm(image_vit, tmp_path)
    (folder / "config.json").unlink()
    model, _ = loaded(folder / "model.safetensors")
    assert (model.config.num_heads, model.config.depth, model.config.mlp_width) == (3, 2, 48)
    assert_equal_features(model, image_vit)


def test_configs_that_name_timm_or_no_ratio_are_told_by_their_tensors(tmp_path):
    folder = as_timm(MODELS["dino"](), tmp_path / "timm", model_type="timm")
    assert read_config(resolve_weights(str(folder))).network["width"] == 32
    other = saved(MODELS["dino"](), tmp_path / "vit")
    (other / "config.json").write_text('{"model_type": "timm"}')
    with pytest.raises(ModelError, match="its model_type is 'timm'; tvit reads vit"):
        loaded(other)
    folder = saved(MODELS["dinov2"](), tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"mlp_ratio": ', '"mlp_ratio": NaN, "was": '))
    with pytest.raises(ModelError, match="mlp_ratio is nan; it must be a number above 0"):
        loaded(folder)


SCALE, REGISTERS = "encoder.layer.0.layer_scale1.lambda1", "embeddings.register_tokens"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (put(SCALE, tensor=torch.ones(31)), r"lambda1 has the shape \(31,\), not \(32,\)"),
        (put(REGISTERS, tensor=torch.ones(1, 2, 32)), r"shape \(1, 2, 32\), not \(1, 3, 32\)"),
        (drop(REGISTERS), "embeddings.register_tokens is missing"),
        (drop("encoder.layer.1.layer_scale2.lambda1"), "layer_scale2.lambda1 is missing"),
    ],
)
def test_tensors_of_a_family_that_do_not_fit_are_refused_by_name(spoil, sentence, tmp_path):
    folder = saved(registers(), tmp_path)
    spoil(folder)
    with pytest.raises(ModelError, match=sentence):
        loaded(folder)


@pytest.mark.parametrize(
    "name", ["dinov2 with SwiGLU", "dinov2 with registers", "clip", "siglip", "dinov3, huge"]
)
def test_adapters_on_a_family_train_and_merge(name, tmp_path):
    model, _ = loaded(saved(randomised(MODELS[name]()), tmp_path))
    names = list(model.state_dict())
    targets = ("q", "k", "v", "proj", "fc1", "fc2")
    spec = LoraSpec(rank=2, alpha=2, dropout=0, use_rslora=False, bias="none", targets=targets, exclude=())
    set_trainable(model, "lora", spec, seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(pictures().unsqueeze(1)).square().sum().backward()
    optimizer.step()
    before = model(pictures().unsqueeze(1))
    merge(model)
    torch.testing.assert_close(model(pictures().unsqueeze(1)), before, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == names
