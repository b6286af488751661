"""Linear layers: fused LoRA and dynamic int8 quantisation."""

import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tvit_cli.model import linear, lora
from tvit_cli.model.linear import Int8Linear, draw_mask, lora_linear, to_int8
from tvit_cli.portable import layers
from tvit_cli.portable.vit import ViTConfig, build_model

CPU = torch.device("cpu")


def tensors(shape=(2, 7, 12), *, outputs=10, rank=3, **facts):
    """Input, weight, bias, A, B; the weight and bias frozen."""
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (outputs, shape[-1]), (outputs,), (rank, shape[-1]), (outputs, rank))
    made = [torch.randn(s, generator=generator, **facts) for s in shapes]
    return [tensor.requires_grad_(i in (0, 3, 4)) for i, tensor in enumerate(made)]


def plain(x, weight, bias, a, b, keep, **facts):
    """PEFT's formula, in autograd's own operations."""
    gelu, p = facts.get("gelu"), facts.get("dropout", 0.0)
    x = x if gelu is None else F.gelu(x, approximate=gelu)
    dropped = x if keep is None else x * keep.view(x.shape) / (1 - p)
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a), b) * facts["scale"]


def gradients(output, inputs):
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return list(torch.autograd.grad(output, inputs, seed))


@pytest.fixture(params=[2**18, 30], ids=["one chunk", "chunks of two rows"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_the_plain_formula(dropout, gelu, dtype):
    inputs = tensors(dtype=dtype)
    facts = {"scale": 1.7, "dropout": dropout, "gelu": gelu}
    torch.manual_seed(3)
    output = lora_linear(*inputs, **facts)
    torch.manual_seed(3)
    keep = draw_mask(inputs[0].numel(), dropout, CPU) if dropout else None
    expected = plain(*inputs, keep, **facts)
    learnt = [inputs[i] for i in (0, 3, 4)]
    close = lambda a, b: torch.testing.assert_close(  # noqa: E731
        a, b, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=1e-5 if dtype == torch.float32 else 1e-12
    )
    close(output, expected)
    for own, right in zip(gradients(output, learnt), gradients(expected, learnt), strict=True):
        close(own, right)


@pytest.mark.usefixtures("chunk")
def test_gradients_are_those_of_finite_differences():
    inputs = tensors((3, 4), outputs=3, rank=2, dtype=torch.float64)
    for learnt in (0, 2, 3, 4):  # all but the weight, which is frozen
        inputs[learnt].requires_grad_()
    for gelu in (None, "none"):

        def layer(*inputs, gelu=gelu):
            torch.manual_seed(0)
            return lora_linear(*inputs, scale=0.5, dropout=0.25, gelu=gelu)

        assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("learning", [0, 2, 3, 4])
def test_each_gradient_is_right_when_nothing_else_learns(learning):
    """Input, bias, A and B: what one of them needs is kept though no other asks for it."""
    inputs = [tensor.requires_grad_(i == learning) for i, tensor in enumerate(tensors())]
    for gelu in (None, "none"):
        facts = {"scale": 2.0, "gelu": gelu}
        (own,) = gradients(lora_linear(*inputs, **facts), [inputs[learning]])
        (right,) = gradients(plain(*inputs, None, **facts), [inputs[learning]])
        torch.testing.assert_close(own, right, atol=1e-5, rtol=1e-5)


def test_frozen_weights_and_frozen_inputs_get_no_gradient():
    inputs = tensors()
    inputs[0].requires_grad_(False)
    lora_linear(*inputs, scale=1.0, dropout=0.1).sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [True, True, True, False, False]


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 4, 12), (0, 12)])
def test_any_number_of_leading_dimensions(shape):
    inputs = tensors(shape)
    output = lora_linear(*inputs, scale=1.0)
    torch.testing.assert_close(output, plain(*inputs, None, scale=1.0), atol=1e-5, rtol=1e-5)
    assert gradients(output, inputs[:1])[0].shape == shape


def test_inputs_and_gradients_with_gaps_between_rows():
    x, *rest = tensors((4, 6, 24))
    learnt = [x, rest[2], rest[3]]
    rest[0], rest[2] = rest[0][:, ::2], rest[2][:, ::2]
    gapped = x.transpose(0, 1)[:, :, ::2]
    own = lora_linear(gapped, *rest, scale=1.0)
    right = plain(gapped, *rest, None, scale=1.0)
    torch.testing.assert_close(own, right, atol=1e-5, rtol=1e-5)
    seed = torch.randn(4, 10, 6).permute(2, 0, 1)
    for a, b in zip(
        torch.autograd.grad(own, learnt, seed), torch.autograd.grad(right, learnt, seed), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.003, 0.25, 0.93])
def test_numbers_are_dropped_with_the_probability_that_was_asked_for(dropout):
    torch.manual_seed(0)
    count = 2**20
    kept = draw_mask(count, dropout, CPU)
    assert set(kept.unique().tolist()) == {0, 1}
    deviation = math.sqrt(dropout * (1 - dropout) / count)
    assert abs(1 - kept.double().mean() - dropout) < 5 * deviation


def test_numbers_are_dropped_independently_of_each_other():
    """The correlation of neighbours, of the bytes of a word, of words and of two draws is chance alone."""
    torch.manual_seed(0)
    dropped = 1 - draw_mask(2**20, 0.1, CPU).double()
    other = 1 - draw_mask(2**20, 0.1, CPU).double()
    normal = (dropped - 0.1) / 0.3
    for distance in (1, 2, 3, 4, 7, 8, 16, 768):
        assert abs((normal[distance:] * normal[:-distance]).mean()) < 5 / 2**10
    assert abs((normal * (other - 0.1) / 0.3).mean()) < 5 / 2**10
    counts = torch.bincount(dropped.view(-1, 8).sum(1).long(), minlength=9)  # binomial(8, 0.1)
    for hits, seen in enumerate(counts.tolist()):
        share = math.comb(8, hits) * 0.1**hits * 0.9 ** (8 - hits)
        assert abs(seen - 2**17 * share) < 5 * math.sqrt(2**17 * share) + 1


def test_the_mask_is_fixed_by_torchs_seed_and_not_by_the_number_of_threads():
    threads = torch.get_num_threads()
    masks = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(7)
            masks.append(draw_mask(100_003, 0.1, CPU))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], draw_mask(100_003, 0.1, CPU))


def saved_bytes(work, *, without):
    """Bytes that autograd keeps for the backward pass, besides those of some tensors."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = work()
    del output
    return sum(
        size for key, size in saved.items() if key not in {t.untyped_storage().data_ptr() for t in without}
    )


def test_the_input_a_byte_mask_and_the_narrow_product_are_all_that_is_kept():
    x, *weights = tensors((64, 256), outputs=128, rank=4)
    kept = saved_bytes(lambda: lora_linear(x, *weights, scale=1.0, dropout=0.1), without=weights)
    assert kept == 4 * x.numel() + x.numel() + 4 * 64 * 4
    without_dropout = saved_bytes(lambda: lora_linear(x, *weights, scale=1.0), without=weights)
    assert without_dropout == 4 * x.numel() + 4 * 64 * 4


def test_a_gelu_that_was_taken_over_keeps_nothing_of_its_own():
    x, *weights = tensors((64, 256), outputs=128, rank=4)
    apart = saved_bytes(lambda: lora_linear(F.gelu(x), *weights, scale=1.0), without=weights)
    taken = saved_bytes(lambda: lora_linear(x, *weights, scale=1.0, gelu="none"), without=weights)
    assert apart - taken == 4 * x.numel()


def test_under_autocast_no_copy_of_the_frozen_weight_is_kept():
    x, *weights = tensors((64, 256), outputs=128, rank=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = saved_bytes(lambda: lora_linear(x, *weights, scale=1.0), without=weights)
    product, lora_a, lora_b = 64 * 4, 4 * 256, 128 * 4
    assert kept == 2 * (x.numel() + product + lora_a + lora_b)


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    inputs = tensors()
    with torch.no_grad():
        assert saved_bytes(lambda: lora_linear(*inputs, scale=1.0, dropout=0.1), without=[]) == 0


def test_attention_computes_on_a_device_that_autocast_does_not_know():
    config = ViTConfig(num_classes=2, frame_size=16, patch_size=8, n_frames=2, width=32, depth=1, num_heads=2)
    model = build_model(config, seed=0, from_scratch=True).to("meta")
    assert model(torch.empty(1, 2, 3, 16, 16, device="meta")).shape == (1, 2)


def test_queries_keys_and_values_keep_one_input_under_autocast():
    config = ViTConfig(num_classes=2, frame_size=16, patch_size=8, n_frames=2, width=32, depth=1, num_heads=2)
    model = build_model(config, seed=0, from_scratch=True).train()
    lora.attach(model, lora.LoraSpec(2, 4, 0.0, False, "none", ("q", "k", "v"), ()), seed=0)
    kept = {}

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape == (1, 1, 9, 32):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        tokens = torch.randn(1, 1, 9, 32, requires_grad=True)
        model.blocks[0].attention(tokens).sum()
    assert len(kept) == 1


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast_computes_in_bfloat16_with_gradients_in_weight_dtype(inside):
    inputs = tensors()
    learnt = [inputs[i] for i in (0, 3, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = lora_linear(*inputs, scale=1.0, gelu="none")
        own = gradients(output, learnt) if inside else None
    own = own or gradients(output, learnt)
    assert output.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in own)
    right = plain(*inputs, None, scale=1.0, gelu="none")
    torch.testing.assert_close(output.float(), right, atol=0.1, rtol=0.05)
    for a, b in zip(own, gradients(right, learnt), strict=True):
        torch.testing.assert_close(a, b, atol=0.2, rtol=0.05)


def test_gradient_checkpointing_draws_the_same_mask_again():
    inputs = tensors()
    results = []
    for again in (False, True):
        torch.manual_seed(5)
        layer = lambda x: lora_linear(x, *inputs[1:], scale=1.0, dropout=0.5, gelu="none")  # noqa: E731
        output = checkpoint(layer, inputs[0], use_reentrant=False) if again else layer(inputs[0])
        torch.rand(3)  # moves the generator between the passes
        results.append(gradients(output, [inputs[0], inputs[3], inputs[4]]))
    assert all(map(torch.equal, *results))


def test_on_mps_a_repeated_pass_draws_what_the_first_one_drew(monkeypatch):
    """torch keeps the draws of CPUs and CUDA alone; here it keeps none, and the processor's stand for MPS's."""
    monkeypatch.setattr(torch.mps, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", torch.set_rng_state)
    x = torch.ones(64, requires_grad=True)
    drop = lambda x: F.dropout(x, 0.5) * x  # noqa: E731
    dropped = checkpoint(
        drop, x, use_reentrant=False, preserve_rng_state=False, context_fn=layers._mps_rng_contexts
    )
    torch.rand(3)  # moves the generator between the passes
    state = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(dropped.sum(), [x])
    assert torch.equal(gradient != 0, dropped != 0) and 0 < int((dropped != 0).sum()) < 64
    assert torch.equal(torch.get_rng_state(), state)


def test_an_input_changed_before_the_backward_pass_is_noticed():
    inputs = tensors()
    x = inputs[0].detach().clone()
    output = lora_linear(x, *inputs[1:], scale=1.0)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


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
