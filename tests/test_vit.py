"""The temporal ViT and its attention schemes: shapes, initialisation, frame order, cost, export."""

import json
import typing
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tvit_cli.engine.train.dryrun import count_flops
from tvit_cli.model.folder import load_model, save_model
from tvit_cli.model.lora import LoraSpec, merge, set_trainable, trainable_tensors
from tvit_cli.portable.config import ACTIVATIONS as ACTIVATION_NAMES
from tvit_cli.portable.config import ATTENTIONS, POOLS
from tvit_cli.portable.layers import ACTIVATIONS, DropPath, attend, over_time
from tvit_cli.portable.vit import POOLING, SCHEMES, TemporalViT, TokenDrop, ViTConfig, build_model
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.train import TrainSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT loads transformers, which warns of its optional dependencies
    import peft  # noqa: F401

SMALL = ViTConfig(num_classes=5, frame_size=24, patch_size=8, n_frames=4, width=32, depth=2, num_heads=4)


def small(**changes):
    return ViTConfig.from_dict({**SMALL.to_dict(), **changes})


def clips_for(config, *, n_clips=2, n_frames=None, seed=0):
    size = config.frame_size
    shape = (n_clips, n_frames or config.n_frames, config.num_channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"frame_size": 100, "patch_size": 14},
            "frame_size 100 is not a multiple of patch_size 14; use 98 or 112",
        ),
        ({"frame_size": 10, "patch_size": 14}, "frame_size 10 is not a multiple of patch_size 14; use 14"),
        ({"n_frames": 7, "tubelet_size": 2}, "n_frames 7 is not a multiple of tubelet_size 2; use 6 or 8"),
        ({"width": 100, "num_heads": 12}, "width 100 is not a multiple of num_heads 12; use 96 or 108"),
        ({"depth": 0}, "depth is 0; it must be a whole number, 1 or more"),
        ({"depth": 2.5}, "depth is 2.5; it must be a whole number"),
        ({"mlp_width": -1}, "mlp_width is -1; it must be a whole number"),
        ({"norm_eps": 0}, "norm_eps is 0; it must be a number above 0"),
        ({"qkv_bias": "yes"}, "qkv_bias is 'yes'; it must be true or false"),
        ({"activation": "gloo"}, "activation 'gloo' is not known; use one of gelu, gelu_tanh"),
        ({"activation": ["gelu"]}, r"activation is \['gelu'\]; it must be a name"),
        ({"attention": "joined"}, "attention 'joined' is not known; use one of joint, divided"),
        ({"pool": "max"}, "pool 'max' is not known; use one of class, mean, attentive"),
        (
            {"attention": "space", "tubelet_size": 2},
            "tubelet_size 2 depends on the order .* use tubelet_size 1",
        ),
        ({"attention": "joint", "temporal_depth": 1}, "attention joint has no temporal blocks"),
        ({"attention": "factorized", "temporal_depth": 0}, "temporal_depth is 0; it must be a whole number"),
        ({"rotary_grid": 14}, "rotary_grid 14 with positions grid; give both or none"),
        ({"positions": "grid_rotary_2d"}, "rotary_grid None with positions grid_rotary_2d"),
        ({"widht": 3}, "unknown keys 'widht'; known are num_classes, frame_size"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_nearest_that_do(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**changes)


def test_a_config_survives_plain_values_and_needs_a_class_count():
    assert ViTConfig.from_dict(SMALL.to_dict()) == SMALL
    assert SMALL.mlp_width == 4 * SMALL.width
    with pytest.raises(ValueError, match="'num_classes' is missing"):
        ViTConfig.from_dict({"width": 32})


def test_parameters_carry_the_documented_names_and_shapes():
    shapes = {
        name: tuple(weight.shape) for name, weight in TemporalViT(small(tubelet_size=2)).named_parameters()
    }
    expected = {
        "patch_embed.weight": (32, 6, 8, 8), "patch_embed.bias": (32,), "temporal.embedding": (1, 2, 1, 32),
        "positions.class_token": (1, 1, 32), "positions.class_position": (1, 1, 32),
        "positions.spatial": (1, 9, 32), "norm.weight": (32,), "norm.bias": (32,),
        "classifier.weight": (5, 32), "classifier.bias": (5,),
    }  # fmt: skip
    layers = {"attention.q": (32, 32), "attention.k": (32, 32), "attention.v": (32, 32)}
    layers |= {"attention.proj": (32, 32), "mlp.fc1": (128, 32), "mlp.fc2": (32, 128)}
    for block in (0, 1):
        for layer, shape in layers.items():
            expected[f"blocks.{block}.{layer}.weight"] = shape
            expected[f"blocks.{block}.{layer}.bias"] = shape[:1]
        for norm in ("norm1", "norm2"):
            expected |= {f"blocks.{block}.{norm}.weight": (32,), f"blocks.{block}.{norm}.bias": (32,)}
    assert shapes == expected


def test_shape_comments_are_true():
    config = small(tubelet_size=2)
    model = build_model(config, seed=0, from_scratch=True)
    shapes = {}

    def record(name):
        def keep(module, inputs, output):
            shapes[name] = tuple((output[0] if isinstance(output, tuple) else output).shape)

        return keep

    for name, module in model.named_modules():
        module.register_forward_hook(record(name))  # type: ignore[arg-type]
    assert model.features(clips_for(config, n_clips=3)).shape == (3, 32)
    assert model(clips_for(config, n_clips=3)).shape == (3, 5)
    tokens = 1 + 2 * 9
    assert shapes["patch_embed"] == (3 * 2, 32, 3, 3)
    assert shapes["temporal"] == (3, 2, 9, 32)
    assert shapes["positions"] == (3, 1, tokens, 32)
    assert shapes["blocks.0"] == shapes["blocks.0.attention"] == shapes["blocks.0.mlp"] == (3, 1, tokens, 32)
    assert shapes["blocks.1.attention.k"] == (3, 1, tokens, 32)
    assert shapes["blocks.1"] == shapes["blocks.1.attention.q"] == (3, 1, 1, 32)
    assert shapes["norm"] == (3, 1, 1, 32)
    assert shapes["pool"] == (3, 1, 32)
    assert shapes["summary"] == (3, 32)


def test_asking_for_the_class_token_alone_changes_nothing_about_it():
    model = build_model(SMALL, seed=0, from_scratch=True)
    tokens = torch.randn(2, 1, 37, 32, generator=torch.Generator().manual_seed(0))
    block = model.blocks[1]
    torch.testing.assert_close(block(tokens, n_queries=1), block(tokens)[:, :, :1], atol=1e-6, rtol=1e-5)


def test_layers_start_as_asked_and_without_bias():
    model = build_model(SMALL, seed=0, from_scratch=True)
    for layer in (model.blocks[0].mlp.fc1, model.patch_embed):
        rows, columns = layer.weight.flatten(1).shape
        bound = (6 / (rows + columns)) ** 0.5
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not layer.bias.any()
    assert model.classifier.weight.std() > 0.5 * model.blocks[0].attention.q.weight.std()
    assert torch.equal(model.classifier.bias, torch.zeros(5))
    model = build_model(small(width=128), seed=0, truncated_normal=True, from_scratch=True)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(layers) == 2 + 2 * 6
    for layer in layers:
        assert layer.weight.abs().max() <= 0.04 + 1e-6
        assert layer.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.1)  # 0.88: what the cut leaves
        assert torch.count_nonzero(layer.bias) == 0


def test_pretrained_models_start_without_time_and_favour_no_class():
    assert torch.count_nonzero(build_model(SMALL, seed=0, from_scratch=False).temporal.embedding) == 0
    drawn = build_model(SMALL, seed=0, from_scratch=True).temporal.embedding
    assert drawn.std().item() == pytest.approx(0.88 * 0.02, rel=0.25)
    logits = build_model(small(width=128), seed=0, from_scratch=False)(clips_for(SMALL))
    assert logits.softmax(-1).sub(1 / 5).abs().max() < 0.01


def test_tubelets_see_their_order_and_times_are_interpolated_linearly():
    model = build_model(small(tubelet_size=2), seed=0, from_scratch=False)
    clips = clips_for(SMALL)
    swapped = clips[:, [1, 0, 3, 2]]
    assert (model.features(swapped) - model.features(clips)).abs().max() > 1e-3
    temporal = TemporalViT(SMALL).temporal
    with torch.no_grad():
        temporal.embedding.copy_(torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 1, 32))
    assert temporal(torch.zeros(1, 4, 9, 32))[0, :, 0, 0].tolist() == [0, 1, 2, 3]
    assert temporal(torch.zeros(1, 2, 9, 32))[0, :, 0, 0].tolist() == [0.5, 2.5]
    assert temporal(torch.zeros(1, 1, 9, 32))[0, :, 0, 0].tolist() == [1.5]


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 4, 1, 24, 24), r"have the shape \(2, 4, 1, 24, 24\); it must be \(B, T, 3, H, W\)"),
        ((4, 3, 24, 24), r"have the shape \(4, 3, 24, 24\)"),
        ((2, 4, 3, 20, 24), "20 x 24 pixels; both must be multiples of patch_size 8"),
        ((2, 4, 3, 24, 0), "24 x 0 pixels"),
        ((2, 3, 3, 24, 24), "3 frames, no multiple of tubelet_size 2"),
        ((2, 0, 3, 24, 24), "0 frames"),
    ],
)
def test_clips_of_the_wrong_shape_are_refused(shape, sentence):
    model = TemporalViT(small(tubelet_size=2))
    with pytest.raises(ValueError, match=sentence):
        model(torch.zeros(shape))


def test_every_activation_changes_what_is_computed():
    clips = clips_for(SMALL)
    features = [
        build_model(small(activation=name), seed=0, from_scratch=True).features(clips) for name in ACTIVATIONS
    ]
    for i, first in enumerate(features):
        for second in features[:i]:
            assert (first - second).abs().max() > 1e-5


def test_flop_counts_are_the_papers_and_those_of_torch():
    flops = count_flops(ViTConfig(num_classes=1000, n_frames=1))
    assert flops == pytest.approx(2 * 17.6e9, rel=0.08)  # DeiT (arXiv:2012.12877): 17.6 G multiply-adds
    shape = config("factorized", tubelet_size=2, depth=1, temporal_depth=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        TemporalViT(shape)(clips(1, 6))
    assert count_flops(shape, 6) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_drop_path_drops_whole_clips_in_training_more_in_later_blocks():
    torch.manual_seed(0)
    scaled = DropPath(0.25)(torch.ones(400, 3, 2))
    by_clip = scaled.flatten(1)
    assert torch.equal(by_clip, by_clip[:, :1].expand_as(by_clip))
    assert set(by_clip[:, 0].tolist()) == {0.0, float(torch.tensor(1) / 0.75)}
    assert scaled.mean().item() == pytest.approx(1, abs=0.07)
    blocks = TemporalViT(small(depth=5), drop_path=0.4).blocks
    assert [getattr(block.drop_path, "keep", 1.0) for block in blocks] == pytest.approx(
        [1, 0.9, 0.8, 0.7, 0.6]
    )
    assert not any(isinstance(module, DropPath) for module in TemporalViT(small(depth=5)).modules())
    plain = build_model(SMALL, seed=3, from_scratch=True)
    dropping = build_model(SMALL, seed=3, from_scratch=True, drop_path=0.5)
    assert dropping.config == plain.config and dropping.state_dict().keys() == plain.state_dict().keys()
    clips = clips_for(SMALL, n_clips=8)
    assert torch.equal(dropping.eval()(clips), plain(clips))
    torch.manual_seed(0)
    assert not torch.equal(dropping.train()(clips), plain(clips))


def test_a_dropped_last_block_changes_nothing_and_gets_no_gradient():
    model = build_model(SMALL, seed=3, from_scratch=True, drop_path=1 - 1e-12)
    before = []
    model.blocks[0].register_forward_hook(lambda block, given, tokens: before.append(tokens))
    features = model.features(clips_for(SMALL))
    assert torch.equal(features, model.norm(before[0][:, 0, 0]))
    model = build_model(SMALL, seed=3, from_scratch=True, drop_path=1 - 1e-12)
    model(clips_for(SMALL)).sum().backward()
    last = [parameter.grad for parameter in model.blocks[-1].parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in last)


def test_token_drop_differs_per_clip_and_agrees_across_joint_groups():
    torch.manual_seed(0)
    places = torch.arange(1.0, 41).expand(6, 3, 40).unsqueeze(-1)  # (clips, groups, patches, 1)
    times = torch.tensor([100.0, 200, 300]).view(1, 3, 1, 1)
    kept = (TokenDrop(0.75, aligned=True)(places + times) - times)[..., 0]
    assert kept.shape == (6, 3, 10)
    assert all(len(set(group.tolist())) == 10 for group in kept.flatten(0, 1))  # none twice
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert len({tuple(sorted(clip[0].tolist())) for clip in kept}) == 6
    assert TokenDrop(0.9, aligned=True)(places[:, :, :3]).shape[2] == 1  # never none
    apart = (TokenDrop(0.75, aligned=False)(places + times) - times)[..., 0]
    assert all(len({tuple(sorted(group.tolist())) for group in clip}) == 3 for clip in apart)
    assert {name for name, scheme in SCHEMES.items() if scheme.attends_over_time} == {"divided"}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_token_drop_is_of_the_training_alone_and_spares_the_class_token(attention):
    config = small(attention=attention, tubelet_size=1 if attention == "space" else 2)
    plain = build_model(config, seed=3, from_scratch=True)
    dropping = build_model(config, seed=3, from_scratch=True, token_drop=0.5)
    assert dropping.config == plain.config and dropping.state_dict().keys() == plain.state_dict().keys()
    clips = clips_for(config, n_clips=4)
    assert torch.equal(dropping.eval()(clips), plain(clips))
    seen = []
    dropping.blocks[0].register_forward_pre_hook(lambda block, given: seen.append(given[0]))
    assert not torch.equal(dropping.train()(clips), plain(clips))
    first = plain.positions.class_token + plain.positions.class_position
    patches = config.patches_per_frame * (
        config.n_frames // config.tubelet_size if attention == "joint" else 1
    )
    assert seen[0].shape[2] == 1 + round(0.5 * patches)
    assert torch.equal(seen[0][:, :, :1], first.expand_as(seen[0][:, :, :1]))


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
    assert tuple(POOLING)[:-1] == POOLS == typing.get_args(fields["pool"].annotation)
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


class OnCuda(torch.Tensor):
    is_cuda = True


def test_attention_over_more_groups_than_a_cuda_grid_has_is_cut(monkeypatch):
    """As `divided` attention over the time of 257 clips of 256 places each is; here in numbers of a CPU."""
    whole, sizes = F.scaled_dot_product_attention, []
    q, k, v = torch.randn(3, 257 * 256, 1, 2, 4, generator=torch.Generator().manual_seed(0)).as_subclass(
        OnCuda
    )
    expected = whole(q, k, v)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *kv: sizes.append(len(q)) or whole(q, *kv)
    )
    torch.testing.assert_close(attend(q, k, v), expected)
    assert sizes == [65_535, 257]


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
    model = build(attention, pool=pool, depth=1)
    shapes = {"clips": {0: torch.export.Dim("clips", min=1, max=64)}}
    exported = torch.export.export(model, (clips(2),), dynamic_shapes=shapes, strict=True)
    torch.testing.assert_close(exported.module()(clips(3)), model(clips(3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "pool"), [("rotary", "mean"), ("rotary_2d", "class"), ("grid_rotary_2d", "class")]
)
def test_rotary_models_export_with_a_free_number_of_clips(positions, pool):
    own = {"rotary_grid": 2} if positions == "grid_rotary_2d" else {}
    model = build("joint", positions=positions, class_token=pool == "class", pool=pool, depth=1, **own)
    shapes = {"clips": {0: torch.export.Dim("clips", min=1, max=64)}}
    exported = torch.export.export(model, (clips(2),), dynamic_shapes=shapes)
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
