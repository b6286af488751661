"""Pretrained weights: equal to transformers at step 0; refusals of bad folders."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file

from tvit_cli.errors import ModelError
from tvit_cli.model import weights as weights_module
from tvit_cli.model.pretrained import load_pretrained, read_config, resolve_weights
from tvit_cli.portable.config import ATTENTIONS
from tvit_cli.portable.vit import TemporalViT, build_model
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


def save_quietly(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)


def random_weights(model):
    """Numbers large enough that a wrong position, bias or norm shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def image_vit():
    model = transformers.ViTModel(hugging_face_config()).eval()
    random_weights(model)
    return model


@pytest.fixture
def folder(image_vit, tmp_path):
    save_quietly(image_vit, tmp_path / "weights")
    return tmp_path / "weights"


def loaded(folder, **shape):
    source = resolve_weights(str(folder))
    config = read_config(source).vit_config(**{"num_classes": 3, "n_frames": 8, **shape})
    model = build_model(config, seed=0, from_scratch=False).eval()
    return model, load_pretrained(model, source)


def pictures(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def class_token(image_vit, images, **options):
    return image_vit(pixel_values=images, **options).last_hidden_state[:, 0]


@torch.no_grad()
def our_class_token(model, images):
    return model.features(images.unsqueeze(1))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_at_step_0_a_one_frame_clip_gives_the_class_token_of_the_image_vit(image_vit, folder):
    model, _ = loaded(folder)
    images = pictures(32)
    expected = class_token(image_vit, images)
    torch.testing.assert_close(our_class_token(model, images), expected, **CLOSE)
    assert (expected - expected[:1]).abs().max() > 0.01  # it does depend on the picture


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "joint"])
def test_frame_wise_scheme_at_step_0_averages_the_image_vits_class_tokens(image_vit, folder, attention):
    model, _ = loaded(folder, attention=attention)
    frames = [pictures(32) + t for t in range(5)]
    expected = torch.stack([class_token(image_vit, images) for images in frames]).mean(0)
    with torch.no_grad():
        features = model.features(torch.stack(frames, dim=1))
    torch.testing.assert_close(features, expected, **CLOSE)


def test_other_frame_sizes_use_interpolated_positions(image_vit, folder):
    model, _ = loaded(folder)
    images = pictures(56)
    expected = class_token(image_vit, images, interpolate_pos_encoding=True)
    torch.testing.assert_close(our_class_token(model, images), expected, **CLOSE)


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
    torch.testing.assert_close(our_class_token(model, images), expected, **CLOSE)
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
    image_vit = transformers.ViTModel(hugging_face_config(**changes)).eval()
    random_weights(image_vit)
    save_quietly(image_vit, tmp_path)
    model, _ = loaded(tmp_path)
    images = pictures(32)
    torch.testing.assert_close(our_class_token(model, images), class_token(image_vit, images), **CLOSE)


def test_the_weights_of_a_classifier_load_without_its_classifier(tmp_path):
    classifier = transformers.ViTForImageClassification(hugging_face_config()).eval()
    random_weights(classifier)
    save_quietly(classifier, tmp_path)
    model, report = loaded(tmp_path)
    images = pictures(32)
    torch.testing.assert_close(our_class_token(model, images), class_token(classifier.vit, images), **CLOSE)
    assert sorted(report.unused) == ["classifier.bias", "classifier.weight"]


def test_the_weights_of_masked_modelling_load_without_its_decoder(tmp_path):
    masked = transformers.ViTForMaskedImageModeling(hugging_face_config(encoder_stride=8)).eval()
    save_quietly(masked, tmp_path)
    _, report = loaded(tmp_path)
    assert sorted(report.unused) == ["decoder.0.bias", "decoder.0.weight", "embeddings.mask_token"]


def test_the_report_counts_what_matched_and_names_what_is_new_and_unused(folder):
    _, report = loaded(folder)
    assert report.matched == 4 + 2 * 16 + 2
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")
    assert sorted(report.unused) == ["pooler.dense.bias", "pooler.dense.weight"]
    note = "no preprocessor_config.json: frames are normalised with ImageNet's mean and std; put it beside weights that have others"
    assert report.notes == (note,)


def test_sharded_weights_load_like_one_file(image_vit, folder, tmp_path):
    save_quietly(image_vit, tmp_path / "sharded", max_shard_size="20KB")
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


def test_the_hash_is_that_of_the_weights_file(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert read_config(resolve_weights(str(folder))).sha256 == digest


def test_the_hash_of_sharded_weights_depends_on_each_shard(image_vit, tmp_path):
    save_quietly(image_vit, tmp_path, max_shard_size="20KB")
    before = resolve_weights(str(tmp_path)).sha256
    last = max(tmp_path.glob("model-*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(last).items()}, last)
    assert resolve_weights(str(tmp_path)).sha256 != before


def test_normalisation_comes_from_the_preprocessor_config(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}))
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std, config.notes) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), ())
    edit_json(path, do_normalize=False)
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_without_a_preprocessor_config_normalisation_is_imagenets(folder):
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_values_left_out_of_the_config_are_those_of_hugging_face(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": [384, 384]}))
    config = read_config(resolve_weights(str(folder)))
    default = transformers.ViTConfig()
    assert [config.network[k] for k in ("width", "depth", "num_heads")] == [768, 12, 12]
    assert config.network["norm_eps"] == default.layer_norm_eps
    assert (config.network["mlp_width"], config.image_size) == (default.intermediate_size, 384)


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


def test_a_model_of_another_network_is_refused(folder):
    source = resolve_weights(str(folder))
    config = read_config(source).vit_config(num_classes=3, n_frames=8)
    values = {**config.to_dict(), "num_heads": 8}  # the same shapes, other numbers
    with pytest.raises(ModelError, match="num_heads is 4, and 8 in the model"):
        load_pretrained(TemporalViT(type(config).from_dict(values)), source)


def test_a_weights_file_is_taken_with_the_config_beside_it(folder):
    by_file, by_folder = resolve_weights(str(folder / "model.safetensors")), resolve_weights(str(folder))
    assert by_file.sha256 == by_folder.sha256
    assert read_config(by_file).network == read_config(by_folder).network
    assert read_config(by_file).network["width"] == 32


def test_pickled_weights_are_refused_with_a_conversion_hint(folder):
    (folder / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"not a \.safetensors file.*save_pretrained"):
        resolve_weights(str(folder / "weights.bin"))


def test_a_lone_file_of_unknown_names_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(
        ModelError, match=r"no config\.json beside it names a model_type; tvit reads vit, deit, dinov2"
    ):
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
    with pytest.raises(
        ModelError, match=r"hub cannot be reached\. Connect once to fetch it, or name a folder"
    ):
        resolve_weights("someone/vit")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, "no such public repository .* hf auth login"),
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
    torch.testing.assert_close(our_class_token(model, images), expected, **CLOSE)
