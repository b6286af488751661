"""Dynamic int8 quantisation of linear layers."""

import time

import pytest
import torch
from torch import nn

from tvit_cli.model import linear
from tvit_cli.model.linear import Int8Linear, to_int8
from tvit_cli.portable.vit import ViTConfig, build_model


def test_the_faster_of_bytes_and_floats_is_found_out(monkeypatch):
    multiply = torch._int_mm

    def slow(*factors):
        time.sleep(0.05)
        return multiply(*factors)

    monkeypatch.setattr(torch, "_int_mm", slow)
    assert not linear.is_fast()
    monkeypatch.setattr(torch, "_int_mm", lambda *factors: None)
    assert linear.is_fast()


def test_whole_numbers_times_scales_are_multiplied_without_any_error():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, -3, 0], [0.5, 63.5, -1]]))  # scales 1 and 0.5
        layer.bias.copy_(torch.tensor([1.0, -2]))
    x = torch.tensor([[127.0, 1, 2], [-254, 4, 6]])  # scales 1 and 2
    assert torch.equal(Int8Linear(layer)(x), layer(x).detach())


def test_a_row_and_a_token_of_zeros_stay_zeros():
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    out = Int8Linear(layer)(x)
    assert torch.equal(out[0], torch.zeros(3)) and out[1, 1] == 0 and out[1].count_nonzero() == 2


@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64), (1, 1, 64)])
def test_int8_error_is_rounding_despite_one_large_token(shape):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32)
    x = torch.randn(shape, generator=generator)
    x[..., -1, :] *= 1000  # a scale for all tokens would leave the others nothing
    whole, rounded = layer(x).detach(), Int8Linear(layer)(x)
    assert rounded.shape == whole.shape
    off = (rounded - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert 0 < off.max() < 0.03


@pytest.mark.parametrize("attention", ["joint", "divided", "factorized", "space"])
def test_int8_applies_to_every_linear_layer_but_the_classifier(attention):
    config = ViTConfig(
        num_classes=5, frame_size=32, n_frames=4, width=32, depth=2, num_heads=2, attention=attention
    )
    model = build_model(config, seed=0, from_scratch=True).eval()
    clips = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(clips)
        linear = sum(isinstance(part, nn.Linear) for part in model.modules())
        assert to_int8(model, exclude="classifier") == linear - 1 > 11
        after = model(clips)
    assert [path for path, part in model.named_modules() if isinstance(part, nn.Linear)] == ["classifier"]
    assert 0 < (after - before).norm() / before.norm() < 0.1
