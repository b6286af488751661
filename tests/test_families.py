"""Families of pretrained ViTs against transformers, at step 0."""

import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tvit_cli.errors import ModelError
from tvit_cli.model.families import CLIP_MEAN, FAMILIES
from tvit_cli.model.lora import LoraSpec, merge, set_trainable
from tvit_cli.model.pretrained import load_pretrained, read_config, resolve_weights
from tvit_cli.portable.vit import build_model, resize_grid

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers warns of its optional dependencies
    import transformers

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
}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def saved(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def loaded(path, **shape):
    source = resolve_weights(str(path))
    config = read_config(source).vit_config(**{"num_classes": 3, "n_frames": 4, **shape})
    model = build_model(config, seed=0, from_scratch=False).eval()
    return model, load_pretrained(model, source)


def pictures(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(model, images):
    kind = type(model).__name__
    interpolate = {} if images.shape[-1] == 32 or "Dinov2" in kind else {"interpolate_pos_encoding": True}
    output = model(pixel_values=images, **interpolate)
    return output.pooler_output if "CLIP" in kind else output.last_hidden_state[:, 0]


@torch.no_grad()
def ours(model, images):
    return model.features(images.unsqueeze(1))


def assert_equal_features(model, image_vit, size=32):
    expected = theirs(image_vit, pictures(size))
    torch.testing.assert_close(ours(model, pictures(size)), expected, atol=1e-5, rtol=1e-4)
    assert (expected - expected[:1]).abs().max() > 0.01  # it does depend on the picture


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [32, 16, 56])
def test_at_step_0_a_frame_gives_the_class_token_of_the_familys_own_model(name, size, tmp_path):
    image_vit = randomised(MODELS[name]())
    model, report = loaded(saved(image_vit, tmp_path), frame_size=size)
    assert_equal_features(model, image_vit, size)
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")


@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_takes_every_family(name, tmp_path):
    image_vit = randomised(MODELS[name]())
    model, _ = loaded(saved(image_vit, tmp_path), attention="divided", pool="class")
    frames = torch.stack([pictures(), pictures() + 1], dim=1)
    expected = (theirs(image_vit, pictures()) + theirs(image_vit, pictures() + 1)) / 2
    with torch.no_grad():
        torch.testing.assert_close(model.features(frames), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "family", "unused"),
    [
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
    ids=["deit", "dinov2", "clip"],
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


def test_the_vision_tower_of_a_clip_that_classifies_images_loads(tmp_path):
    config = transformers.CLIPConfig(vision_config={**SHAPE, "intermediate_size": 48}, num_labels=2)
    whole = randomised(transformers.CLIPForImageClassification(config))
    model, report = loaded(saved(whole, tmp_path))
    assert_equal_features(model, getattr(whole.vision_model, "vision_model", whole.vision_model))
    assert {"classifier.weight", "classifier.bias"} <= set(report.unused)


def test_clips_normalisation_is_its_own_where_no_file_says_it(tmp_path):
    config = read_config(resolve_weights(str(saved(clip(), tmp_path))))
    assert config.mean == CLIP_MEAN
    assert config.notes == (
        "no preprocessor_config.json: frames are normalised with CLIP's mean and std; put it beside weights that have others",
    )


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


@pytest.mark.parametrize("absent", ["ls1", "ls2"])
def test_timm_weights_with_one_of_two_layer_scales_are_refused(absent, tmp_path):
    folder = as_timm(randomised(dinov2()), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if f".{absent}." not in name}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"blocks\.0\.{absent}\.gamma is missing"):
        loaded(folder)


def test_timms_positions_may_leave_out_the_class_token(tmp_path):
    image_vit = registers()
    image_vit.embeddings.position_embeddings.data[:, 0] = 0
    folder = as_timm(randomised(image_vit), tmp_path)
    image_vit.embeddings.position_embeddings.data[:, 0] = 0
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "pos_embed": tensors["pos_embed"][:, 1:].contiguous()}, folder / "model.safetensors"
    )
    assert_equal_features(loaded(folder)[0], image_vit)


def test_timms_config_says_how_pictures_are_normalised(tmp_path):
    half = [0.5, 0.5, 0.5]
    folder = as_timm(MODELS["dino"](), tmp_path, pretrained_cfg={"mean": half, "std": half})
    config = read_config(resolve_weights(str(folder)))
    assert (config.mean, config.std, config.notes) == ((0.5,) * 3, (0.5,) * 3, ())


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


def test_timm_weights_of_an_unknown_width_ask_for_the_number_of_heads(tmp_path):
    folder = as_timm(MODELS["dino"](), tmp_path, model_args={})
    with pytest.raises(
        ModelError, match=r'attention heads is not known for width 32.*"model_args": \{"num_heads": 8\}'
    ):
        loaded(folder)


def test_a_config_that_calls_itself_timm_is_told_by_its_tensors(tmp_path):
    folder = as_timm(MODELS["dino"](), tmp_path / "timm", model_type="timm")
    assert read_config(resolve_weights(str(folder))).network["width"] == 32
    other = saved(MODELS["dino"](), tmp_path / "vit")
    (other / "config.json").write_text('{"model_type": "timm"}')
    with pytest.raises(ModelError, match="its model_type is 'timm'; tvit reads vit"):
        loaded(other)


def test_a_ratio_that_is_no_number_is_named(tmp_path):
    folder = saved(MODELS["dinov2"](), tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"mlp_ratio": ', '"mlp_ratio": NaN, "was": '))
    with pytest.raises(ModelError, match="intermediate_size is None; it must be a whole number"):
        loaded(folder)


def test_timm_weights_that_normalise_queries_are_refused_by_name(tmp_path):
    folder = as_timm(MODELS["dino"](), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "blocks.0.attn.q_norm.weight": torch.ones(8)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.q_norm\.weight is unexpected.*use a plain ViT"):
        loaded(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        (
            "encoder.layer.0.layer_scale1.lambda1",
            torch.ones(31),
            r"lambda1 has the shape \(31,\), not \(32,\)",
        ),
        ("embeddings.register_tokens", torch.ones(1, 2, 32), r"shape \(1, 2, 32\), not \(1, 3, 32\)"),
        ("embeddings.register_tokens", None, "embeddings.register_tokens is missing"),
        ("encoder.layer.1.layer_scale2.lambda1", None, "layer_scale2.lambda1 is missing"),
    ],
)
def test_tensors_of_a_family_that_do_not_fit_are_refused_by_name(name, tensor, sentence, tmp_path):
    folder = saved(registers(), tmp_path)
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items() if k != name}
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=sentence):
        loaded(folder)


@pytest.mark.parametrize("name", ["dinov2 with SwiGLU", "dinov2 with registers", "clip"])
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


def test_families_are_told_by_the_model_type_that_transformers_writes(tmp_path):
    for number, make in enumerate(MODELS.values()):
        folder = saved(make(), tmp_path / str(number))
        assert json.loads((folder / "config.json").read_text())["model_type"] in FAMILIES


def test_timms_positions_are_resized_as_timm_does(tmp_path):
    folder = as_timm(randomised(registers()), tmp_path)
    native = loaded(folder)[0].positions.spatial
    smaller = loaded(folder, frame_size=16)[0].positions.spatial
    assert torch.equal(smaller, resize_grid(native, (2, 2), antialias=True))
    assert not torch.allclose(smaller, resize_grid(native, (2, 2)), atol=1e-3)
