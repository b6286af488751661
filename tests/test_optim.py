"""Parameter groups, learning rate, loss of an update, average of the weights."""

import math

import pytest
import torch
from torch import nn

from tvit_cli.engine.evaluate.metrics import Tally
from tvit_cli.engine.train import optim
from tvit_cli.engine.train.optim import (
    Targets,
    adamw,
    layer_scale,
    learning_rate_at,
    loss_share,
    parameter_groups,
    set_rates,
)
from tvit_cli.engine.train.state import WeightAverage
from tvit_cli.errors import ModelError
from tvit_cli.model.lora import LoraSpec, attach, set_trainable
from tvit_cli.portable.vit import TemporalViT, ViTConfig

TINY = ViTConfig(num_classes=2, frame_size=16, patch_size=8, n_frames=2, width=8, depth=1, num_heads=2)


def grouped(model, **choices):
    facts = {"weight_decay": 0.3, "bias_weight_decay": False, "norm_weight_decay": False, **choices}
    return parameter_groups(model, **facts)


def by_name(model, groups, kept):
    """Name of each parameter -> one fact of its group."""
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: group[kept] for group in groups for p in group["params"]}


def decayed(**choices):
    model = TemporalViT(TINY)
    decay = by_name(model, grouped(model, **choices), "weight_decay")
    assert decay.keys() == dict(model.named_parameters()).keys()  # every parameter is in one group
    return {name for name, value in decay.items() if value == 0.3}


def test_weight_decay_leaves_out_biases_norms_positions_and_frozen():
    names = decayed()
    assert "blocks.0.attention.q.weight" in names and "patch_embed.weight" in names
    assert not any("norm" in n or n.endswith("bias") or "positions" in n or "temporal" in n for n in names)
    model = TemporalViT(TINY)
    model.patch_embed.requires_grad_(False)
    groups = grouped(model, bias_weight_decay=True, norm_weight_decay=True)
    assert all(p.requires_grad for g in groups for p in g["params"])


def test_the_lengths_of_weights_that_dora_learns_are_not_decayed():
    model = TemporalViT(TINY)
    attach(model, LoraSpec(2, 2.0, 0.0, False, "none", ("q", "patch_embed"), (), use_dora=True), seed=0)
    free = {name for name, value in by_name(model, grouped(model), "weight_decay").items() if value == 0}
    layers = ("blocks.0.attention.q", "patch_embed")
    lengths = {f"{layer}.lora_magnitude_vector.default.weight" for layer in layers}
    assert free == lengths | {"classifier.bias", "temporal.embedding"}


def test_biases_and_norms_are_decayed_when_asked():
    more = decayed(bias_weight_decay=True) - decayed()
    assert "blocks.0.attention.q.bias" in more and "classifier.bias" in more
    assert not any("norm" in n for n in more)
    norms = ("blocks.0.norm1", "blocks.0.norm2", "norm")
    assert decayed(norm_weight_decay=True) - decayed() == {
        f"{n}.{k}" for n in norms for k in ("weight", "bias")
    }


def scales(model, layer_decay, **choices):
    """Trainable parameter -> its share of the learning rate."""
    return by_name(model, grouped(model, layer_decay=layer_decay, **choices), "rate_scale")


def test_each_block_learns_at_a_share_of_the_rate_of_the_block_after_it():
    model = TemporalViT(ViTConfig.from_dict({**TINY.to_dict(), "depth": 3}))
    found = scales(model, 0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, scale in found.items():
        top = name.split(".")[0]
        expected = {"blocks": 0.5 ** (3 - int(name.split(".")[1])) if top == "blocks" else 0, "norm": 1.0,
                    "classifier": 1.0, "temporal": 1.0, "patch_embed": 0.5**4, "positions": 0.5**4}[top]  # fmt: skip
        assert scale == expected, name


def test_adapters_learn_at_their_blocks_rate_told_by_whole_names():
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
    assert layer_scale("patch_embed_norm", depth=2, layer_decay=0.5) == 1
    assert layer_scale("blocks", depth=2, layer_decay=0.5) == 1
    assert layer_scale("head.blocks.0", depth=2, layer_decay=0.5) == 1
    assert layer_scale("positions", depth=2, layer_decay=0.5) == 0.125


def test_adamw_is_fused_and_its_groups_follow_the_schedule():
    assert [group["rate_scale"] for group in grouped(TemporalViT(TINY))] == [1.0, 1.0]
    groups = grouped(TemporalViT(TINY), layer_decay=0.5)
    optimizer = adamw(groups, learning_rate=1.0, betas=(0.9, 0.999), epsilon=1e-8)
    for rate in (0.1, 0.02):
        set_rates(optimizer, rate)
        assert {group["lr"] for group in optimizer.param_groups} == {rate, rate * 0.5, rate * 0.25}
        assert all(group["lr"] == rate * group["rate_scale"] for group in optimizer.param_groups)
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
    assert learning_rate_at(0, peak=2.0, warmup_steps=0, total_steps=3) == 2.0


@pytest.mark.parametrize("attention", ["factorized", "divided"])
def test_temporal_layers_have_their_own_learning_rate(attention):
    model = TemporalViT(ViTConfig.from_dict({**TINY.to_dict(), "attention": attention}))
    found = scales(model, 0.5, temporal_rate=0.3)
    slow = {name for name, scale in found.items() if scale == 0.3}
    assert slow == {name for name in found if name.startswith("summary.")}
    assert found["blocks.0.attention.q.weight"] == 0.5
    if attention == "divided":
        assert found["blocks.0.temporal.scale.gate"] == found["temporal.embedding"] == 1
        assert found["blocks.0.temporal.attention.q.weight"] == 0.5
    else:
        assert {"summary.times.embedding", "summary.temporal_blocks.0.attention.q.weight"} <= slow


@pytest.mark.parametrize(
    ("mode", "targets"),
    [
        ("lora", ("q",)), ("lora", ("q", "classifier")), ("all", ()), ("last-1", ()), ("classifier", ()),
        ("probe", ()),
    ],
)  # fmt: skip
def test_classifier_has_its_own_learning_rate_in_every_mode(mode, targets):
    config = ViTConfig.from_dict({**TINY.to_dict(), "attention": "factorized", "pool": "attentive"})
    model = TemporalViT(config)
    set_trainable(model, mode, LoraSpec(2, 2.0, 0.0, False, "none", targets, ()), seed=0)
    choices = {"layer_decay": 0.5, "temporal_rate": 0.3}
    before, after = (scales(model, **choices, classifier_rate=rate) for rate in (1.0, 10.0))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("classifier.")} != set()
    assert {after[name] for name in changed} == {10.0}


# Two classes; softmax of (0, ln 3) is (1/4, 3/4).
LOGITS = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [0.0, math.log(3)]])
LABELS = torch.tensor([1, 1, 0])
ONES = torch.ones(3)
MIXED = Targets(LABELS, ONES, others=torch.tensor([0, 0, 0]), shares=torch.tensor([0.3, 0.75, 0.5]))
RARE, LIKELY = math.log(4), math.log(4 / 3)  # of probability 1/4, of 3/4


def clip_losses(logits, targets, *, class_weights=(1, 1), label_smoothing=0.0):
    weights = torch.tensor(class_weights)
    return optim.clip_losses(logits, targets, class_weights=weights, label_smoothing=label_smoothing)


ONE, SMOOTH = Targets(LABELS, ONES), {"label_smoothing": 0.2}  # 0.9 on the label, 0.1 beside it
ON_LABEL_1 = [0.8 * share + 0.1 for share in (0.3, 0.75, 0.0)]  # of the mixed clips, smoothed
COSTS = [(RARE, LIKELY), (LIKELY, RARE), (RARE, LIKELY)]  # of labels 0 and 1


@pytest.mark.parametrize(
    ("targets", "how", "wanted"),
    [
        (ONE, {}, [LIKELY, RARE, RARE]),
        (ONE, SMOOTH, [0.9 * a + 0.1 * b for a, b in [(LIKELY, RARE), (RARE, LIKELY), (RARE, LIKELY)]]),
        (MIXED, {}, [0.3 * LIKELY + 0.7 * RARE, 0.75 * RARE + 0.25 * LIKELY, RARE]),
        (MIXED, SMOOTH, [(1 - p) * a + p * b for p, (a, b) in zip(ON_LABEL_1, COSTS, strict=True)]),
    ],
    ids=["one label", "smoothed", "mixed by shares", "smoothed on top of the mixture"],
)
def test_a_clip_costs_its_labels_by_their_shares(targets, how, wanted):
    assert clip_losses(LOGITS, targets, **how).tolist() == pytest.approx(wanted)


def test_losses_weigh_by_class_and_equal_labels_mix_to_the_same():
    plain = clip_losses(LOGITS, Targets(LABELS, ONES), class_weights=(0.5, 3.0), label_smoothing=0.2)
    even = clip_losses(LOGITS, Targets(LABELS, ONES), label_smoothing=0.2)
    assert plain.tolist() == pytest.approx((even * torch.tensor([3.0, 3.0, 0.5])).tolist())
    mixed = clip_losses(LOGITS, MIXED, class_weights=(0.5, 3.0))
    assert mixed[0] == pytest.approx(0.3 * 3.0 * LIKELY + 0.7 * 0.5 * RARE)
    same = Targets(LABELS, ONES, others=LABELS, shares=torch.tensor([0.3, 0.75, 0.5]))
    for smoothing in (0.0, 0.1):
        plain = clip_losses(LOGITS, Targets(LABELS, ONES), label_smoothing=smoothing)
        assert torch.allclose(clip_losses(LOGITS, same, label_smoothing=smoothing), plain)


def test_updates_are_means_over_clips_and_accuracy_counts_main_labels():
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert loss_share(losses, Targets(LABELS, ONES), step_clips=3) == 3.0
    left_out = Targets(LABELS, torch.tensor([1.0, 0.0, 1.0]))
    assert loss_share(losses, left_out, step_clips=10) == pytest.approx(0.7)
    assert MIXED.main.tolist() == [0, 1, 0] and Targets(LABELS, ONES).main.tolist() == [1, 1, 0]
    tally = Tally.zeros(torch.device("cpu"))
    tally.add(LOGITS, clip_losses(LOGITS, MIXED), MIXED.main, MIXED.weights)
    assert tally.sums[1:].tolist() == [0, 3]  # predicted 1, 0, 1
    tally.add(LOGITS, ONES, Targets(LABELS, ONES).main, ONES)
    assert tally.sums[1:].tolist() == [1, 6]


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    layers[0].requires_grad_(False)
    return layers


@torch.no_grad()
def train_a_step(layers):
    for parameter in layers.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape))


def test_average_starts_as_the_weights_and_moves_by_the_decay():
    layers = model()
    ema = WeightAverage(layers, 0.9)
    assert ema.tensors.keys() == {"1.weight", "1.bias"}
    assert torch.equal(ema.tensors["1.weight"], layers[1].weight)
    train_a_step(layers)
    assert not torch.equal(ema.tensors["1.weight"], layers[1].weight)
    decays = [WeightAverage(model(), 0.9).decay_at(step) for step in (0, 1, 8, 79, 80, 10**6)]
    assert decays == pytest.approx([1 / 10, 2 / 11, 1 / 2, 80 / 89, 0.9, 0.9])
    layers = model()
    ema = WeightAverage(layers, 0.15)
    expected = layers[1].bias.detach().double()
    for step in range(4):
        train_a_step(layers)
        ema.update(step)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layers[1].bias.detach().double()
    assert torch.allclose(ema.tensors["1.bias"].double(), expected, atol=1e-6)


def test_ema_weights_are_swapped_in_and_restored_after_any_end():
    layers = model()
    ema = WeightAverage(layers, 0.9)
    train_a_step(layers)
    ema.update(0)
    own, average = layers[1].weight.detach().clone(), ema.tensors["1.weight"].clone()
    with pytest.raises(KeyError), ema.in_place():
        assert torch.equal(layers[1].weight, average) and not torch.equal(own, average)
        raise KeyError
    assert torch.equal(layers[1].weight, own) and torch.equal(ema.tensors["1.weight"], average)


def test_a_saved_average_is_taken_whole_or_not_at_all():
    ema, other = WeightAverage(model(), 0.9), model()
    train_a_step(other)
    saved = WeightAverage(other, 0.9).tensors
    with pytest.raises(ModelError, match=r"1\.bias is missing"):
        ema.load({"1.weight": saved["1.weight"]})
    assert not torch.equal(ema.tensors["1.weight"], saved["1.weight"])
    ema.load(saved)
    assert all(torch.equal(ema.tensors[name], tensor) for name, tensor in saved.items())
