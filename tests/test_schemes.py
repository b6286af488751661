"""Every attention scheme and pool: shapes, gradients, frame order, cost, export."""

import json
import typing
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tvit_cli.engine.train.dryrun import count_flops
from tvit_cli.model.folder import load_model, save_model
from tvit_cli.model.lora import LoraSpec, merge, set_trainable, trainable_tensors
from tvit_cli.portable.config import ACTIVATIONS as ACTIVATION_NAMES
from tvit_cli.portable.config import ATTENTIONS, POOLS
from tvit_cli.portable.layers import ACTIVATIONS, over_time
from tvit_cli.portable.vit import POOLING, SCHEMES, TemporalViT, ViTConfig, build_model
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.train import TrainSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT loads transformers, which warns of its optional dependencies
    import peft  # noqa: F401

SMALL = ViTConfig(num_classes=5, frame_size=24, patch_size=8, n_frames=4, width=32, depth=2, num_heads=4)
FRAME_WISE = [scheme for scheme in ATTENTIONS if scheme != "joint"]
TEMPORAL = [scheme for scheme in ATTENTIONS if scheme != "space"]
SPEC = LoraSpec(
    rank=2, alpha=2, dropout=0, use_rslora=False, bias="none", targets=("q", "k", "v", "fc1", "fc2"),
    exclude=(),
)  # fmt: skip
every_scheme = pytest.mark.parametrize("attention", ATTENTIONS)
every_pool = pytest.mark.parametrize("pool", POOLS)


def config(attention, **changes):
    return ViTConfig.from_dict(
        {**SMALL.to_dict(), "temporal_depth": None, "mlp_width": None, "attention": attention, **changes}
    )


def build(attention, *, from_scratch=True, seed=0, **changes):
    return build_model(config(attention, **changes), seed=seed, from_scratch=from_scratch).eval()


def moved(model):
    """Stands in for training: what starts as nothing is something now."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def clips(n_clips=2, n_frames=4, size=24):
    return torch.randn(n_clips, n_frames, 3, size, size, generator=torch.Generator().manual_seed(0))


def spread(a, b):
    return (a - b).abs().max().item()


def test_settings_config_and_tables_name_the_same_choices():
    fields = TrainSettings.model_fields
    assert tuple(SCHEMES) == ATTENTIONS == typing.get_args(fields["attention"].annotation)
    assert tuple(POOLING) == POOLS == typing.get_args(fields["pool"].annotation)
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


@every_scheme
@every_pool
def test_clips_become_logits_and_the_state_dict_is_parameters_alone(attention, pool):
    model = build(attention, pool=pool)
    assert model.features(clips(3)).shape == (3, 32)
    assert model(clips(3)).shape == (3, 5)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert list(model.buffers()) == []


@every_scheme
def test_numbers_keep_their_type(attention):
    model = build(attention, pool="attentive")
    double = build(attention, pool="attentive").double()(clips().double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(model(clips()), double.float(), atol=1e-4, rtol=1e-4)
    assert model.bfloat16()(clips().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("attention", FRAME_WISE)
@every_pool
def test_at_first_a_frame_wise_scheme_is_the_mean_of_its_frames_alone(attention, pool):
    """A clip of one frame has no time; `test_pretrained` holds that case against transformers."""
    model = build(attention, from_scratch=False, pool=pool)
    frames = torch.stack([model.features(clips()[:, t : t + 1]) for t in range(4)])
    torch.testing.assert_close(model.features(clips()), frames.mean(0), atol=1e-5, rtol=1e-4)
    assert spread(frames[0], frames[1]) > 0.1


@pytest.mark.parametrize("attention", TEMPORAL)
def test_temporal_schemes_depend_on_frame_order_from_scratch_or_trained(attention):
    blind = build(attention, from_scratch=False)
    torch.testing.assert_close(blind.features(clips().flip(1)), blind.features(clips()), atol=1e-5, rtol=1e-4)
    for model in (build(attention), moved(blind)):
        assert spread(model.features(clips().flip(1)), model.features(clips())) > 1e-3


@every_pool
def test_space_never_sees_the_order(pool):
    model = moved(build("space", pool=pool))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(clips()[:, order]), model(clips()), atol=1e-6, rtol=1e-5)


def test_a_later_frame_reaches_an_earlier_ones_class_token():
    model = moved(build("divided", from_scratch=False))
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    changed = clips()
    changed[:, 1] += 1
    for batch in (clips(), changed):
        model(batch)
    assert seen[0].shape == (2, 4, 1, 32)  # a class token per frame: only they ask in the last block
    assert spread(seen[0][:, 0], seen[1][:, 0]) > 1e-4


def test_attention_over_time_looks_along_one_place():
    frames = torch.randn(2, 4, 9, 32, generator=torch.Generator().manual_seed(0))
    attention = build("joint").blocks[0].attention
    by_hand = torch.stack([attention(frames[:, None, :, n])[:, 0] for n in range(9)], dim=2)
    torch.testing.assert_close(over_time(attention, frames), by_hand, atol=1e-6, rtol=1e-5)


def test_an_attentive_pool_starts_as_the_mean_and_then_weighs():
    pool = build("joint", pool="attentive").pool
    tokens = torch.randn(2, 3, 10, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(tokens), tokens.mean(2))
    with torch.no_grad():
        pool.queries[1] = 1e4 * tokens[0, 0, 7]  # the second head asks for one token alone
    torch.testing.assert_close(pool(tokens)[0, 0, 8:16], tokens[0, 0, 7, 8:16])
    torch.testing.assert_close(pool(tokens)[0, 0, 16:], tokens[0, 0, :, 16:].mean(0))


@every_scheme
@every_pool
def test_mean_pool_ignores_the_class_token_and_class_pool_the_rest(attention, pool):
    part = build(attention, pool=pool).pool
    tokens = torch.zeros(1, 1, 4, 32)
    tokens[:, :, 0] = 1
    assert part(tokens).unique().tolist() == {"class": [1.0], "mean": [0.0], "attentive": [0.25]}[pool]


@every_scheme
@pytest.mark.parametrize("mode", ["lora", "all"])
def test_gradients_reach_every_trainable_parameter(attention, mode):
    """After one step: an adapter that starts as nothing hides what is before it from the first gradient."""
    model = build(attention, from_scratch=False, pool="attentive").train()
    set_trainable(model, mode, SPEC, seed=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(clips()).square().sum().backward()
        optimizer.step()
        silent = [name for name, p in model.named_parameters() if p.requires_grad and not (p.grad != 0).any()]
        optimizer.zero_grad()
    keys = [name for name in silent if name.endswith(".k.bias") or "k.base_layer.bias" in name]
    assert silent == keys  # the same number added to all scores of a softmax changes nothing
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (mode == "lora")


@every_scheme
def test_with_adapters_what_an_image_vit_lacks_is_trained_in_full(attention):
    model = build(attention, from_scratch=False)
    image_vit = set(build("space").state_dict())
    copies = set(model.copied_parameters())
    lacked = {name for name in model.state_dict() if name not in image_vit and name not in copies}
    set_trainable(model, "lora", SPEC, seed=0)
    in_full = {name for name in trainable_tensors(model) if "lora_" not in name}
    assert in_full == lacked | {"classifier.weight", "classifier.bias"}
    adapted = {name.partition(".lora_A")[0] for name in trainable_tensors(model) if ".lora_A" in name}
    assert adapted == {
        name
        for name, module in build(attention).named_modules()
        if name.rpartition(".")[2] in SPEC.targets and not name.startswith("summary.")
    }
    assert bool(lacked) == (attention != "space")


def test_a_linear_probe_trains_the_classifier_and_an_attentive_pool():
    model = build("divided", pool="attentive")
    set_trainable(model, "classifier", SPEC, seed=0)
    assert set(trainable_tensors(model)) == {"classifier.weight", "classifier.bias", "pool.queries"}


@every_scheme
def test_merged_adapters_compute_the_same(attention):
    model = build(attention)
    names = list(model.state_dict())
    set_trainable(model, "lora", SPEC, seed=0)
    moved(model)
    before = model(clips())
    merge(model)
    torch.testing.assert_close(model(clips()), before, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == names


@every_scheme
def test_first_values_depend_on_the_seed_alone(attention):
    before = torch.get_rng_state()
    first, again, other = (build(attention, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    same = {name for name in first if torch.equal(first[name], other[name])}
    drawn = {name for name in first if name.endswith("weight") and "norm" not in name} | {"positions.spatial"}
    assert not same & drawn
    assert all(tensor.isfinite().all() for tensor in first.values())


@every_scheme
@every_pool
@pytest.mark.parametrize("n_frames", [4, 8, 16, 32])
def test_counted_operations_agree_with_torch(attention, pool, n_frames):
    shape = config(attention, pool=pool, n_frames=n_frames, mlp_width=48)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # no fused kernel is counted
        TemporalViT(shape)(clips(1, n_frames))
    assert count_flops(shape) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flop_count_agrees_with_torch_for_tubelets_and_lengths():
    shape = config("factorized", tubelet_size=2, depth=1, temporal_depth=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        TemporalViT(shape)(clips(1, 6))
    assert count_flops(shape, 6) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("attention", FRAME_WISE)
def test_frame_wise_schemes_cost_what_their_frames_cost_and_joint_more(attention):
    growth = {
        name: count_flops(config(name, width=256, frame_size=96, n_frames=32))
        / count_flops(config(name, width=256, frame_size=96))
        for name in (attention, "joint")
    }
    assert growth[attention] == pytest.approx(8, rel=0.05)
    assert growth["joint"] > 10


@every_scheme
@pytest.mark.parametrize("n_frames", [1, 3, 9])
def test_clips_of_other_lengths_are_taken(attention, n_frames):
    assert build(attention)(clips(2, n_frames)).isfinite().all()


@every_scheme
def test_frames_of_other_sizes_are_taken_and_equal_a_model_made_for_them(attention):
    model, larger = build(attention), build(attention, frame_size=40)
    state = model.state_dict()
    picture = state["positions.spatial"].transpose(1, 2).reshape(1, 32, 3, 3)
    picture = torch.nn.functional.interpolate(picture, size=(5, 5), mode="bicubic", align_corners=False)
    larger.load_state_dict({**state, "positions.spatial": picture.flatten(2).transpose(1, 2)})
    torch.testing.assert_close(model(clips(size=40)), larger(clips(size=40)), atol=1e-5, rtol=1e-4)
    assert model(clips()[..., :16]).shape == (2, 5)  # 24 x 16 pixels


@pytest.mark.parametrize(("attention", "pool"), list(zip(ATTENTIONS, (*POOLS, POOLS[0]), strict=True)))
def test_the_model_exports_whole_with_a_free_number_of_clips(attention, pool):
    model = build(attention, pool=pool)
    shapes = {"clips": {0: torch.export.Dim("clips", min=1, max=64)}}
    exported = torch.export.export(model, (clips(2),), dynamic_shapes=shapes, strict=True)
    torch.testing.assert_close(exported.module()(clips(3)), model(clips(3)), atol=1e-5, rtol=1e-4)


@every_scheme
def test_a_model_folder_gives_every_scheme_back_bit_for_bit(attention, tmp_path):
    model = moved(build(attention, pool="attentive"))
    card = ModelCard(
        tvit_version="0", labels=tuple("abcde"), model=model.config.to_dict(),
        preprocessing=Preprocessing(n_frames=4, frame_size=24), weights_sha256="",
    )  # fmt: skip
    save_model(tmp_path / "model", model.state_dict(), card)
    again, _ = load_model(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(clips()), model(clips()))


def test_a_model_folder_of_the_first_version_loads(tmp_path):
    model = build("joint")
    old = {k: v for k, v in model.config.to_dict().items() if k not in ("pool", "temporal_depth")}
    card = ModelCard(
        tvit_version="0.1.0", labels=tuple("abcde"), model=old,
        preprocessing=Preprocessing(n_frames=4, frame_size=24), weights_sha256="",
    )  # fmt: skip
    save_model(tmp_path / "model", model.state_dict(), card)
    assert "pool" not in json.loads((tmp_path / "model" / "card.json").read_text())["model"]
    assert torch.equal(load_model(tmp_path / "model")[0](clips()), model(clips()))


@every_scheme
def test_under_autocast_logits_have_the_precision_that_tells_classes_apart(attention):
    model = moved(build(attention))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(clips())
        features = model.features(clips())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.classifier(features.float()), atol=1e-6, rtol=1e-6)
    assert not torch.equal(logits, logits.bfloat16().float())
