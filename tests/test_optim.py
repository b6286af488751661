"""Parameter groups and the learning-rate schedule."""

import pytest
from torch import nn

from tvit_cli.engine.train.optim import adamw, layer_scale, learning_rate_at, parameter_groups, set_rates
from tvit_cli.model.lora import LoraSpec, attach
from tvit_cli.portable.vit import TemporalViT, ViTConfig

TINY = ViTConfig(num_classes=2, frame_size=16, patch_size=8, n_frames=2, width=8, depth=1, num_heads=2)


def decayed(**choices):
    model = TemporalViT(TINY)
    facts = {"bias_weight_decay": False, "norm_weight_decay": False, **choices}
    groups = parameter_groups(model, weight_decay=0.3, **facts)
    names = {p: n for n, p in model.named_parameters()}
    assert {p for g in groups for p in g["params"]} == set(names)  # every parameter is in one group
    return {names[p] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}


def test_weight_decay_leaves_out_biases_norms_and_learned_positions():
    names = decayed()
    assert "blocks.0.attention.q.weight" in names and "patch_embed.weight" in names
    assert not any("norm" in n or n.endswith("bias") or "positions" in n or "temporal" in n for n in names)


def test_the_lengths_of_weights_that_dora_learns_are_not_decayed():
    model = TemporalViT(TINY)
    attach(model, LoraSpec(2, 2.0, 0.0, False, "none", ("q", "patch_embed"), (), use_dora=True), seed=0)
    groups = parameter_groups(model, weight_decay=0.3, bias_weight_decay=False, norm_weight_decay=False)
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    free = {name for name, p in model.named_parameters() if id(p) in kept}
    layers = ("blocks.0.attention.q", "patch_embed")
    lengths = {f"{layer}.lora_magnitude_vector.default.weight" for layer in layers}
    assert free == lengths | {"classifier.bias", "temporal.embedding"}


def test_biases_are_decayed_when_asked_and_norms_are_not():
    more = decayed(bias_weight_decay=True) - decayed()
    assert "blocks.0.attention.q.bias" in more and "classifier.bias" in more
    assert not any("norm" in n for n in more)


def test_norms_are_decayed_when_asked_with_their_biases():
    more = decayed(norm_weight_decay=True) - decayed()
    assert more == {
        f"{n}.{kind}" for n in ("blocks.0.norm1", "blocks.0.norm2", "norm") for kind in ("weight", "bias")
    }


def test_frozen_parameters_are_in_no_group():
    model = TemporalViT(TINY)
    model.patch_embed.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, bias_weight_decay=True, norm_weight_decay=True)
    assert all(p.requires_grad for g in groups for p in g["params"])


def scales(model, layer_decay):
    """Trainable parameter -> its share of the learning rate."""
    groups = parameter_groups(
        model, weight_decay=0.1, bias_weight_decay=False, norm_weight_decay=False, layer_decay=layer_decay
    )
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: group["rate_scale"] for group in groups for p in group["params"]}


def test_each_block_learns_at_a_share_of_the_rate_of_the_block_after_it():
    model = TemporalViT(ViTConfig.from_dict({**TINY.to_dict(), "depth": 3}))
    found = scales(model, 0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, scale in found.items():
        top = name.split(".")[0]
        expected = {"blocks": 0.5 ** (3 - int(name.split(".")[1])) if top == "blocks" else 0, "norm": 1.0,
                    "classifier": 1.0, "temporal": 1.0, "patch_embed": 0.5**4, "positions": 0.5**4}[top]  # fmt: skip
        assert scale == expected, name


def test_adapters_learn_at_the_rate_of_the_block_they_sit_in():
    model = TemporalViT(ViTConfig.from_dict({**TINY.to_dict(), "depth": 11}))
    targets = ("q", "fc2", "patch_embed", "classifier")
    spec = LoraSpec(
        rank=2, alpha=2, dropout=0, use_rslora=False, bias="none", targets=targets,
        exclude=("blocks.1.mlp.fc1",),
    )  # fmt: skip
    attach(model, spec, seed=0)
    found = scales(model, 0.5)
    assert found["blocks.0.attention.q.lora_A.default.weight"] == 0.5**11
    assert found["blocks.1.mlp.fc1.weight"] == found["blocks.1.mlp.fc2.lora_B.default.weight"] == 0.5**10
    assert found["blocks.10.attention.q.lora_B.default.weight"] == 0.5
    assert found["patch_embed.lora_A.default.weight"] == 0.5**12
    assert found["classifier.lora_A.default.weight"] == found["temporal.embedding"] == 1


def test_layers_are_told_by_their_whole_names():
    assert layer_scale("patch_embed_norm", depth=2, layer_decay=0.5) == 1
    assert layer_scale("blocks", depth=2, layer_decay=0.5) == 1
    assert layer_scale("head.blocks.0", depth=2, layer_decay=0.5) == 1
    assert layer_scale("positions", depth=2, layer_decay=0.5) == 0.125


def test_without_layer_decay_there_are_two_groups_of_one_rate():
    groups = parameter_groups(
        TemporalViT(TINY), weight_decay=0.1, bias_weight_decay=False, norm_weight_decay=False
    )
    assert [group["rate_scale"] for group in groups] == [1.0, 1.0]


def test_the_schedule_moves_every_group_by_its_share():
    groups = parameter_groups(
        TemporalViT(TINY), weight_decay=0.1, bias_weight_decay=False, norm_weight_decay=False, layer_decay=0.5
    )
    optimizer = adamw(groups, learning_rate=1.0, betas=(0.9, 0.999), epsilon=1e-8)
    for rate in (0.1, 0.02):
        set_rates(optimizer, rate)
        assert {group["lr"] for group in optimizer.param_groups} == {rate, rate * 0.5, rate * 0.25}
        assert all(group["lr"] == rate * group["rate_scale"] for group in optimizer.param_groups)


def test_adamw_is_fused_and_takes_betas_and_epsilon():
    groups = [{"params": list(nn.Linear(2, 2).parameters()), "weight_decay": 0.0}]
    optimizer = adamw(groups, learning_rate=0.1, betas=(0.8, 0.95), epsilon=1e-6)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)
    assert optimizer.defaults["fused"]


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    rates = [learning_rate_at(s, peak=2.0, warmup_steps=4, total_steps=12) for s in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half way down
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.1


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rate_at(0, peak=2.0, warmup_steps=0, total_steps=3) == 2.0


def test_temporal_layers_have_their_own_learning_rate():
    for attention, own in (
        ("factorized", {"summary.times.embedding", "summary.temporal_blocks.0.attention.q.weight"}),
        ("divided", set()),
    ):
        model = TemporalViT(ViTConfig.from_dict({**TINY.to_dict(), "attention": attention}))
        facts = {"weight_decay": 0.1, "bias_weight_decay": False, "norm_weight_decay": False}
        groups = parameter_groups(model, **facts, layer_decay=0.5, temporal_rate=0.3)
        scales = {id(p): group["rate_scale"] for group in groups for p in group["params"]}
        by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
        assert own <= {name for name, scale in by_name.items() if scale == 0.3}
        assert {name for name, scale in by_name.items() if scale == 0.3} == {
            name for name in by_name if name.startswith("summary.")
        }
        assert by_name["blocks.0.attention.q.weight"] == 0.5
        if attention == "divided":
            assert by_name["blocks.0.temporal.scale.gate"] == by_name["temporal.embedding"] == 1
            assert by_name["blocks.0.temporal.attention.q.weight"] == 0.5
