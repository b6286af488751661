"""Exponential moving average of the trainable weights."""

import pytest
import torch
from torch import nn

from tvit_cli.engine.train.state import WeightAverage
from tvit_cli.errors import ModelError


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


def test_it_holds_the_trainable_tensors_and_starts_as_they_are():
    layers = model()
    ema = WeightAverage(layers, 0.9)
    assert ema.tensors.keys() == {"1.weight", "1.bias"}
    assert torch.equal(ema.tensors["1.weight"], layers[1].weight)
    train_a_step(layers)
    assert not torch.equal(ema.tensors["1.weight"], layers[1].weight)


def test_the_decay_rises_to_what_was_asked_for():
    decays = [WeightAverage(model(), 0.9).decay_at(step) for step in (0, 1, 8, 79, 80, 10**6)]
    assert decays == pytest.approx([1 / 10, 2 / 11, 1 / 2, 80 / 89, 0.9, 0.9])


def test_each_update_moves_it_by_what_the_decay_leaves():
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
