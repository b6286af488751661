"""LoRA adapters and linear layers: targets, fused computation, merging, saving, int8."""

import itertools
import json
import math
import re
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrained import MODELS as IMAGE_MODELS
from test_pretrained import as_timm, loaded, randomised, saved
from test_video_weights import MODELS as VIDEO_MODELS
from test_video_weights import as_videomae_v2
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tvit_cli.errors import ModelError
from tvit_cli.model import linear, lora
from tvit_cli.model.linear import Int8Linear, draw_mask, lora_linear, to_int8
from tvit_cli.model.lora import (
    LoraSpec,
    attach,
    bare_state_dict,
    load_trainable,
    merge,
    merged_state_dict,
    own_layer,
    plain_name,
    resolve_layers,
    save_adapter,
    set_trainable,
    start_tensors,
    trainable_report,
    trainable_tensors,
)
from tvit_cli.portable import layers
from tvit_cli.portable.vit import SCHEMES, TemporalViT, ViTConfig, build_model
from tvit_cli.settings.train import LORA_TARGETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT loads transformers, which warns of its optional dependencies
    import peft
    from peft import LoraConfig
    from peft.tuners.lora import Linear as PeftLinear

CONFIG = ViTConfig(num_classes=5, frame_size=16, patch_size=8, n_frames=4, width=32, depth=2, num_heads=4)
FULL = {"classifier.weight", "classifier.bias", "temporal.embedding"}


def base():
    return build_model(CONFIG, seed=0, from_scratch=True)


def spec(**changes):
    values = {
        "rank": 4, "alpha": 8.0, "dropout": 0.0, "use_rslora": False, "bias": "none",
        "targets": ("q", "k", "v"), "exclude": (),
    }  # fmt: skip
    return LoraSpec(**{**values, **changes})


def adapted(seed=0, **changes):
    model = base()
    attach(model, spec(**changes), seed=seed)
    return model.eval()


def clips():
    return torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def perturb(model):
    """Stands in for training: an adapter starts as nothing, so that merging it would show nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def trainable(model):
    return set(trainable_tensors(model))


def adapter_of(*layers):
    return {f"{layer}.{part}.default.weight" for layer in layers for part in ("lora_A", "lora_B")}


def in_blocks(*layers):
    return [f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers]


def equal(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


Q, ATTENTION = (
    in_blocks("attention.q"),
    in_blocks("attention.q", "attention.k", "attention.v", "attention.proj"),
)
LEFT_OUT = ["blocks.0.attention.q", *in_blocks("mlp.fc1")]
ONE_K, TEMPORAL = "blocks.1.attention.k", {"temporal.embedding"}
LEARN = {  # changes of the adapters, layers with an adapter, what learns beside them
    "short names": ({"targets": ("q", "v")}, in_blocks("attention.q", "attention.v"), FULL),
    "a full name": ({"targets": (ONE_K, "fc2")}, [ONE_K, *in_blocks("mlp.fc2")], FULL),
    "every legal name": (
        {"targets": LORA_TARGETS},
        ["patch_embed", "classifier", *ATTENTION, *in_blocks("mlp.fc1", "mlp.fc2")],
        TEMPORAL,
    ),
    "excluded layers learn in full": (
        {"targets": ("q", "k"), "exclude": ("blocks.0.attention.q", "fc1")},
        ["blocks.1.attention.q", *in_blocks("attention.k")],
        FULL | {f"{layer}.{kind}" for layer in LEFT_OUT for kind in ("weight", "bias")},
    ),
    "biases of adapted layers": (
        {"targets": ("q",), "bias": "lora_only"}, Q, FULL | {f"{layer}.base_layer.bias" for layer in Q},
    ),
    "the classifier is frozen below its adapter": ({"targets": ("classifier",)}, ["classifier"], TEMPORAL),
}  # fmt: skip


@pytest.mark.parametrize("case", LEARN)
def test_targets_exclusions_and_bias_decide_what_learns(case):
    changes, adapters, in_full = LEARN[case]
    assert trainable(adapted(**changes)) == in_full | adapter_of(*adapters)


def test_long_lists_and_patterns_reach_their_own_layers_only():
    """PEFT shortens long lists of names to suffixes; the layers that they reach must stay the same."""
    model = build_model(ViTConfig.from_dict({**CONFIG.to_dict(), "depth": 12}), seed=0, from_scratch=True)
    names = tuple(f"blocks.{i}.attention.{layer}" for i in range(11) for layer in ("q", "k", "v"))
    attach(model, spec(targets=names), seed=0)
    assert trainable(model) == FULL | adapter_of(*names)
    model = build_model(ViTConfig.from_dict({**CONFIG.to_dict(), "depth": 12}), seed=0, from_scratch=True)
    attach(model, spec(rank_pattern={"blocks.1.attention.q": 7}), seed=0)
    ranks = {name: layer.r["default"] for name, layer in lora.adapted_layers(model).items()}
    assert [name for name, rank in ranks.items() if rank == 7] == ["blocks.1.attention.q"]
    assert len(ranks) == 36


@pytest.mark.parametrize(
    ("option", "setting"), [("targets", "lora_target_modules"), ("exclude", "lora_exclude_modules")]
)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("clasifier", r"Did you mean classifier\? Legal names are"),
        ("blocks.7.attention.q", r"Did you mean blocks\.\d\.attention\.q\? Legal names are"),
        ("bias", "Legal names are patch_embed, q, k, v, proj, fc1, fc2, classifier, or one layer in full"),
        ("norm", "Legal names are"),
        ("blocks.0", ".*Legal names are"),
        ("", "Legal names are"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(option, setting, name, hint):
    model = base()
    with pytest.raises(ModelError, match=rf"^{setting}: '{name}' is no layer of the model\. {hint}"):
        attach(model, spec(**{option: ("q", name)}), seed=0)
    assert equal(model.state_dict(), base().state_dict())


NARROW = (
    "classifier maps 32 to 5 numbers, so its rank is at most 5, not 8. Give --lora-rank-pattern classifier=5"
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": ("q",), "exclude": ("q",)}, r"No layer is left .* lora_target_modules is q, .* is q\."),
        ({"targets": ()}, "lora_target_modules is empty"),
        ({"rank_pattern": {"p": 4}}, r"lora_rank_pattern: 'p' is no layer of the model\. "),
        ({"rank_pattern": {"fc1": 4}}, r"'fc1' gets no adapter\. Add it to --lora-target-modules"),
        ({"rank_pattern": {"blocks.9.attention.q": 4}}, "is no layer of the model"),
        (
            {"init": "pissa", "targets": ("q", "patch_embed")},
            "--lora-init pissa: patch_embed is a convolution",
        ),
        ({"init": "olora", "targets": LORA_TARGETS}, "--lora-init olora: patch_embed is a convolution"),
        ({"init": "orthogonal", "rank": 3}, "orthogonal: .* has the rank 3; it has to be even. Use 4"),
        ({"init": "pissa", "targets": ("classifier",), "rank": 8}, NARROW),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_name(changes, sentence):
    with pytest.raises(ModelError, match=sentence):
        attach(base(), spec(**changes), seed=0)


def test_every_bias_learns_with_all():
    model = adapted(targets=("q",), bias="all")
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 2 + 1 + 2 * 8
    assert trainable(model) == FULL | adapter_of(*in_blocks("attention.q")) | biases


def test_each_mode_trains_the_parts_that_it_names():
    model = base()
    set_trainable(model, "lora", spec(rank=0), seed=0)
    assert trainable(model) == FULL
    assert equal(model.state_dict(), base().state_dict())
    model = base()
    set_trainable(model, "classifier", spec(), seed=0)
    assert trainable(model) == {"classifier.weight", "classifier.bias"}
    set_trainable(model, "all", spec(), seed=0)
    assert trainable(model) == set(model.state_dict())


def test_training_drops_and_changes_what_is_trainable_and_nothing_else():
    model = adapted(targets=("q", "patch_embed"))
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(clips()).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable(model)
    model = adapted(dropout=0.5)
    perturb(model)
    assert torch.equal(model(clips()), model(clips()))
    model.train()
    assert not torch.equal(model(clips()), model(clips()))


def delta(**changes):
    """The weight update of one layer's adapter, for fixed adapter weights."""
    model = adapted(targets=("q",), **changes)
    perturb(model)
    layer = "blocks.0.attention.q.weight"
    return merged_state_dict(model)[layer] - base().state_dict()[layer]


def test_adapter_scale_is_alpha_over_rank_or_its_root_with_rslora():
    plain = delta()
    torch.testing.assert_close(delta(alpha=16.0), 2 * plain, atol=1e-6, rtol=1e-4)
    root = delta(use_rslora=True)  # 8 / sqrt(4) where plain is 8 / 4
    torch.testing.assert_close(root, 2 * plain, atol=1e-6, rtol=1e-4)
    assert plain.abs().max() > 0.01
    assert torch.linalg.matrix_rank(delta(rank=3), atol=1e-5) == 3


def test_adapters_depend_on_their_seed_and_layers_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trainable_tensors(adapted(seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, trainable_tensors(adapted(seed=3)))
    assert not equal(first, trainable_tensors(adapted(seed=4)))
    first, second = adapted(targets=("v", "q")), adapted(targets=("q", "v", "q"))
    assert equal(trainable_tensors(first), trainable_tensors(second))
    assert resolve_layers(base(), ("v", "q"), option="x") == in_blocks("attention.q", "attention.v")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_new_adapter_changes_nothing_and_a_merged_model_is_a_plain_one(bias):
    model = adapted(targets=LORA_TARGETS, bias=bias)
    assert torch.equal(model(clips()), base()(clips()))
    perturb(model)
    expected = model(clips())
    assert (expected - base()(clips())).abs().max() > 1e-2
    merge(model)
    assert list(model.state_dict()) == list(base().state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in base().modules()]
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(model(clips()), expected, atol=1e-5, rtol=1e-5)


def test_merging_twice_or_without_adapters_changes_nothing():
    model = adapted()
    perturb(model)
    merge(model)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    assert equal(model.state_dict(), once)
    plain = base()
    merge(plain)
    assert equal(plain.state_dict(), base().state_dict())


@pytest.mark.parametrize("targets", [("q", "v"), LORA_TARGETS])
def test_the_merged_state_is_what_merge_leaves_and_leaves_the_model(targets):
    model = adapted(targets=targets)
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in merged_state_dict(model).items()}
    assert equal(model.state_dict(), before)
    merge(model)
    assert equal(state, dict(model.state_dict()))


def test_trainable_tensors_survive_the_way_into_another_model_bit_for_bit():
    first, second = adapted(seed=1), adapted(seed=2)
    perturb(first)
    saved = {name: tensor.clone() for name, tensor in trainable_tensors(first).items()}
    load_trainable(second, saved)
    assert equal(trainable_tensors(second), saved)
    assert torch.equal(second(clips()), first(clips()))


@pytest.mark.parametrize(
    ("remove", "add", "sentence"),
    [
        ("classifier.bias", None, "classifier.bias is missing"),
        (None, ("blocks.9.x", torch.zeros(1)), "blocks.9.x is unexpected"),
        (None, ("classifier.bias", torch.zeros(6)), r"classifier.bias has the shape \(6,\), not \(5,\)"),
    ],
)
def test_trainable_tensors_of_another_model_are_refused_by_name(remove, add, sentence):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
    saved = {name: tensor + 1 for name, tensor in before.items() if name != remove}
    saved.update([add] if add else [])
    with pytest.raises(ModelError, match=sentence):
        load_trainable(model, saved)
    assert equal(trainable_tensors(model), before)


def test_parameters_are_counted():
    model = adapted(targets=("q",))
    own = 2 * 4 * (32 + 32)
    total = sum(weight.numel() for weight in base().parameters())
    assert trainable_report(model) == (own + 5 * 32 + 5 + 4 * 32, total + own)


def injected(monkeypatch, model, dropout):
    """Makes our layers and PEFT's own drop the same numbers: which ones depends on how many there are."""

    def mask(count, dropout, device):
        generator = torch.Generator().manual_seed(count)
        return (torch.rand(count, generator=generator) >= dropout).to(torch.uint8)

    class Dropout(nn.Module):
        def forward(self, x):
            return x * mask(x.numel(), dropout, x.device).view(x.shape) / (1 - dropout)

    monkeypatch.setattr(linear, "draw_mask", mask)
    for module in model.modules():
        if type(module) is PeftLinear and dropout:
            module.lora_dropout["default"] = Dropout()


class Holder(nn.Module):
    """A model inside another one, as in a Hugging Face export."""

    def __init__(self, network: TemporalViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(clips)
        return logits


def loaded_by_peft(model, folder):
    """The saved adapter on the bare model, in which all that was trained in full has other values."""
    save_adapter(model, folder / "adapter", prefix="network.", backbone="backbone")
    state = {name: tensor.clone() for name, tensor in bare_state_dict(model).items()}
    for name in map(plain_name, trainable(model)):
        if name in state:
            state[name] += 1
    bare = build_model(model.config, seed=5, from_scratch=True)
    bare.load_state_dict(state)
    return peft.PeftModel.from_pretrained(Holder(bare), str(folder / "adapter"))


def of_peft(monkeypatch, **changes):
    """The model with PEFT's own layers, as when its hook is gone."""
    with monkeypatch.context() as patched:
        patched.setattr(lora, "own_layer", lambda: None)
        return adapted(**changes)


LINEAR_TARGETS = tuple(name for name in LORA_TARGETS if name != "patch_embed")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_model_computes_and_learns_what_it_does_with_pefts_own_layers(dropout, bias, monkeypatch):
    facts = {"targets": LINEAR_TARGETS, "dropout": dropout, "bias": bias}
    ours, theirs = adapted(**facts), of_peft(monkeypatch, **facts)
    kinds = [{type(layer) for layer in lora.adapted_layers(model).values()} for model in (ours, theirs)]
    assert kinds == [{own_layer()}, {PeftLinear}]
    results = []
    for model in (ours, theirs):
        perturb(model)
        injected(monkeypatch, model, dropout)
        logits = model.train()(clips())
        logits.square().sum().backward()
        results.append({"logits": logits.detach(), **{k: p.grad for k, p in model.named_parameters()}})
    assert list(results[0]) == list(results[1])
    assert {k for k, v in results[0].items() if v is not None} == {"logits"} | trainable(ours)
    for name, right in results[1].items():
        if right is not None:
            scale = max(1.0, float(right.abs().max()))
            torch.testing.assert_close(results[0][name] / scale, right / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lora_equals_peft_in_every_scheme_and_peft_loads_the_adapter(scheme, monkeypatch, tmp_path):
    config = ViTConfig.from_dict({**CONFIG.to_dict(), "attention": scheme})
    gradients = []
    for layer in (own_layer(), None):
        model = build_model(config, seed=0, from_scratch=True)
        with monkeypatch.context() as patched:
            patched.setattr(lora, "own_layer", lambda layer=layer: layer)
            attach(model, spec(targets=LINEAR_TARGETS), seed=0)
        perturb(model)
        model(clips()).square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    for name, right in gradients[1].items():
        scale = max(1.0, float(right.abs().max()))
        torch.testing.assert_close(gradients[0][name] / scale, right / scale, atol=1e-5, rtol=0)
    loaded = loaded_by_peft(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(clips()), model(clips()), atol=1e-5, rtol=1e-5)


def test_the_names_on_disk_are_those_of_pefts_own_layers(monkeypatch):
    ours, theirs = adapted(targets=LORA_TARGETS), of_peft(monkeypatch, targets=LORA_TARGETS)
    assert equal(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("change", ["gone", "ignores", "other arguments", "another forward"])
def test_a_peft_without_its_private_hook_computes_with_its_own_layers(change, monkeypatch):
    before = own_layer()
    if change == "gone":
        monkeypatch.delattr(LoraConfig, "_register_custom_module")
    elif change == "ignores":
        monkeypatch.setattr(LoraConfig, "_register_custom_module", lambda self, mapping: None)
    elif change == "other arguments":
        monkeypatch.setattr(LoraConfig, "_register_custom_module", lambda self: None)
    else:
        forward = PeftLinear.forward
        monkeypatch.setattr(PeftLinear, "forward", lambda self, x: forward(self, x) + 1)
    own_layer.cache_clear()
    try:
        assert own_layer() is None
        model = adapted(targets=("q", "fc2"))
        assert {type(layer) for layer in lora.adapted_layers(model).values()} == {PeftLinear}
        assert trainable(model) == FULL | adapter_of(*in_blocks("attention.q", "mlp.fc2"))
    finally:
        own_layer.cache_clear()
    monkeypatch.undo()
    assert before is not None and own_layer() is not None


def test_a_weight_that_learns_beside_its_adapter_gets_its_gradient(monkeypatch):
    found = []
    for model in (adapted(dropout=0.0), of_peft(monkeypatch, dropout=0.0)):
        layer = next(iter(lora.adapted_layers(model).values()))
        layer.base_layer.weight.requires_grad_(True)
        perturb(model)
        model(clips()).square().sum().backward()
        found.append(layer.base_layer.weight.grad)
    assert found[0] is not None
    torch.testing.assert_close(*found)


def test_merged_and_disabled_adapters_are_pefts_work():
    model = adapted(targets=LINEAR_TARGETS)
    perturb(model)
    expected, layers = model(clips()), lora.adapted_layers(model).values()
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(model(clips()), expected, atol=1e-5, rtol=1e-5)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(model(clips()), expected, atol=1e-5, rtol=1e-5)
    for layer in layers:
        layer.enable_adapters(False)
    state = base().state_dict()
    state.update({k: v for k, v in model.state_dict().items() if k in trainable(model) and k in state})
    plain = base()
    plain.load_state_dict(state)
    torch.testing.assert_close(model(clips()), plain.eval()(clips()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"])
def test_activation_acts_once_with_adapters_and_merged(activation):
    config = ViTConfig.from_dict({**CONFIG.to_dict(), "activation": activation})
    plain = build_model(config, seed=0, from_scratch=True).eval()
    model = build_model(config, seed=0, from_scratch=True).eval()
    attach(model, spec(targets=("fc2",)), seed=0)
    taken = activation.startswith("gelu")
    assert (type(model.blocks[0].mlp.act) is nn.Identity) == taken
    torch.testing.assert_close(model(clips()), plain(clips()), atol=1e-6, rtol=1e-6)
    merge(model)
    assert repr(model.blocks[0].mlp) == repr(plain.blocks[0].mlp)
    torch.testing.assert_close(model(clips()), plain(clips()), atol=1e-6, rtol=1e-6)


def test_a_compiled_model_has_no_graph_break_and_gives_the_same_gradients():
    model = build_model(ViTConfig.from_dict({**CONFIG.to_dict(), "depth": 1}), seed=0, from_scratch=True)
    attach(model.eval(), spec(targets=("q", "fc2")), seed=0)
    perturb(model)
    model(clips()).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(clips()).sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-4)


def test_patterns_give_single_layers_their_own_rank_and_alpha():
    ranks = {"q": 2, "blocks.1.attention.q": 6, "blocks.0.attention.v": 3}
    model = adapted(rank_pattern=ranks, alpha_pattern={"k": 20.0})
    layers = lora.adapted_layers(model)
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    assert found == {
        "blocks.0.attention.q": (2, 4.0), "blocks.0.attention.k": (4, 5.0),
        "blocks.0.attention.v": (3, 8 / 3), "blocks.1.attention.q": (6, 8 / 6),
        "blocks.1.attention.k": (4, 5.0), "blocks.1.attention.v": (4, 2.0),
    }  # fmt: skip


def test_dora_learns_a_magnitude_and_merges_to_what_it_computes():
    model = adapted(targets=LORA_TARGETS, use_dora=True)
    assert torch.allclose(model(clips()), base()(clips()), atol=1e-5)
    assert "blocks.0.attention.q.lora_magnitude_vector.default.weight" in trainable(model)
    perturb(model)
    expected = model(clips())
    state = {name: tensor.clone() for name, tensor in merged_state_dict(model).items()}
    assert (expected - adapted_like(model, use_dora=False)(clips())).abs().max() > 1e-3
    merge(model)
    assert equal(state, dict(model.state_dict()))
    torch.testing.assert_close(model(clips()), expected, atol=1e-4, rtol=1e-4)


def adapted_like(other, **changes):
    """A model with other adapters, and the trained weights that both have."""
    model = adapted(targets=LORA_TARGETS, **changes)
    state = other.state_dict()
    model.load_state_dict({k: state[k] for k in model.state_dict()})
    return model


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "orthogonal"])
def test_an_initialisation_starts_elsewhere_and_at_the_same_function(init):
    model = adapted(init=init, rank_pattern={"v": 2})
    weights = trainable_tensors(model)
    name = "blocks.0.attention.q.lora_A.default.weight"
    assert not torch.equal(weights[name], trainable_tensors(adapted(rank_pattern={"v": 2}))[name])
    if init == "orthogonal":  # its B is not zero
        a, b = weights[name], weights[name.replace("lora_A", "lora_B")]
        torch.testing.assert_close(b @ a, torch.zeros(32, 32), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(clips()), base()(clips()), atol=1e-5, rtol=1e-5)
    assert equal(weights, trainable_tensors(adapted(init=init, rank_pattern={"v": 2})))


def test_pissa_starts_at_the_largest_singular_values():
    model = adapted(targets=("q",), init="pissa")
    weight = base().get_parameter("blocks.0.attention.q.weight").detach()
    left = model.get_parameter("blocks.0.attention.q.base_layer.weight").detach()
    torch.testing.assert_close(
        torch.linalg.svdvals(left)[:28], torch.linalg.svdvals(weight)[4:], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_taken_from_the_weights_survives_another_decomposition(init, monkeypatch):
    """Another machine's decomposition may pick other directions; a checkpoint brings back those of its run."""
    model = adapted(init=init)
    saved = {k: v.clone() for k, v in {**trainable_tensors(model), **start_tensors(model)}.items()}
    assert len(start_tensors(model)) == 2 * 6 and start_tensors(adapted()) == start_tensors(base()) == {}
    perturb(model)
    saved.update({k: v.clone() for k, v in trainable_tensors(model).items()})

    same = adapted(init=init)
    load_trainable(same, saved)
    assert equal(dict(same.state_dict()), dict(model.state_dict()))

    name = "svd" if init == "pissa" else "qr"
    real = getattr(torch.linalg, name)

    def other(weight, **facts):
        left, *middle, right = real(weight, **facts)
        return (left.roll(1, dims=1), *(s.roll(1) for s in middle), right.roll(1, dims=0))

    monkeypatch.setattr(torch.linalg, name, other)
    elsewhere = adapted(init=init)
    layer = "blocks.0.attention.q.base_layer.weight"
    assert not torch.allclose(elsewhere.state_dict()[layer], model.state_dict()[layer], atol=1e-3)
    load_trainable(elsewhere, saved)
    torch.testing.assert_close(dict(elsewhere.state_dict()), dict(model.state_dict()), atol=1e-5, rtol=1e-5)
    assert equal(start_tensors(elsewhere), start_tensors(model))


@pytest.mark.parametrize(("count", "blocks"), [(1, (1,)), (2, (0, 1))])
def test_last_n_trains_last_blocks_norm_classifier_and_frame_times(count, blocks):
    model = base()
    set_trainable(model, f"last-{count}", spec(), seed=0)
    above = {n for n in model.state_dict() if n.startswith(tuple(f"blocks.{i}." for i in blocks))}
    assert trainable(model) == above | {"norm.weight", "norm.bias"} | FULL


def test_last_n_keeps_the_order_of_frames_and_the_number_of_blocks():
    with pytest.raises(ModelError, match=r"--train last-3: the model has 2 blocks\. Give fewer, or all\."):
        set_trainable(base(), "last-3", spec(), seed=0)
    for attention in ("joint", "divided", "factorized"):
        config = ViTConfig.from_dict({**CONFIG.to_dict(), "attention": attention})
        model = build_model(config, seed=0, from_scratch=False)
        set_trainable(model, "last-1", spec(), seed=0)
        parts = {name for part in model.added_modules().values() for name in part.parameters()}
        assert parts and all(parameter.requires_grad for parameter in parts), attention
    tops = {name.split(".")[0] for name in trainable(model)}  # of the factorized one
    assert tops == {"blocks", "norm", "summary", "classifier"}


def test_no_gradient_is_computed_below_what_is_trained():
    """The first tensor with a gradient is the input of the first trained block, or the temporal embedding's output."""
    for attention, mode, expected in (
        ("space", "last-1", [False, False, True]),
        ("joint", "last-1", [False, True, True]),
        ("joint", "lora", [False, True, True]),
    ):
        config = ViTConfig.from_dict({**CONFIG.to_dict(), "attention": attention})
        model = build_model(config, seed=0, from_scratch=True)
        set_trainable(model, mode, spec(), seed=0)
        outputs = []
        for module in (model.patch_embed, model.temporal, model.blocks[1]):
            module.register_forward_hook(lambda _module, _inputs, output, kept=outputs: kept.append(output))
        model(clips())
        assert [output.requires_grad for output in outputs] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": LORA_TARGETS},
        {"exclude": ("fc1",), "bias": "lora_only"},
        {"bias": "all", "use_rslora": True, "rank_pattern": {"blocks.1.attention.q": 2}},
        {"use_dora": True},
        {"init": "pissa", "alpha_pattern": {"k": 3.0}, "rank_pattern": {"v": 2}},
        {"init": "olora", "use_rslora": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_peft_itself_loads_a_saved_adapter_onto_the_bare_model(changes, tmp_path):
    model = adapted(**changes)
    perturb(model)
    loaded = loaded_by_peft(model, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(clips()), model(clips()), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "backbone"


BLOCK = r"(^layer|encoder\.layers?|blocks)\.\d\."
STORED = {  # short name -> names of its weights in the files of all families
    "patch_embed": r"(embeddings\.patch_embeddings?|patch_embed)\.((projection|proj)\.)?weight",
    "q": BLOCK + r".*(query|q_proj|qkv)\.weight",
    "k": BLOCK + r".*(key|k_proj|qkv)\.weight",
    "v": BLOCK + r".*(value|v_proj|qkv)\.weight",
    "proj": BLOCK + r"(attention\.output\.dense|self_attn\.out_proj|(attention|attn)\.(o_)?proj)\.weight",
    "fc1": BLOCK + r"(intermediate\.dense|mlp\.(fc1|weights_in|up_proj))\.weight",
    "fc2": BLOCK + r"(output\.dense|mlp\.(fc2|weights_out|down_proj))\.weight",
}
FAMILIES = {
    name: lambda folder, make=make: saved(randomised(make()), folder)
    for name, make in (IMAGE_MODELS | VIDEO_MODELS).items()
}
FAMILIES["timm"] = lambda folder: as_timm(randomised(IMAGE_MODELS["dino"]()), folder)
FAMILIES["VideoMAE V2"] = lambda folder: as_videomae_v2(FAMILIES["VideoMAE, fine-tuned"](folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_short_names_reach_their_layers_in_every_family(family, tmp_path):
    file = FAMILIES[family](tmp_path) / "model.safetensors"
    stored, (model, _) = load_file(file), loaded(tmp_path)
    reached = {}
    for short, pattern in STORED.items():
        changed = {name: tensor.clone() for name, tensor in stored.items()}
        for tensor in (tensor for name, tensor in changed.items() if re.search(pattern, name)):
            part = (
                tensor.chunk(3)["qkv".index(short)]
                if len(tensor) == 3 * tensor.shape[-1] and short in "qkv"
                else tensor
            )
            part *= 2
        save_file(changed, file)
        state = loaded(tmp_path)[0].state_dict()
        reached[short] = [
            name.removesuffix(".weight")
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, state[name])
        ]
        assert reached[short] == resolve_layers(model, [short], option="lora_target_modules"), short
        assert len(reached[short]) == (1 if short == "patch_embed" else model.config.depth)
    attach(model, spec(targets=LORA_TARGETS), seed=0)
    assert trainable(model) >= adapter_of(*itertools.chain(*reached.values()), "classifier")
    perturb(model)
    size = model.config.frame_size
    frames = torch.randn(2, model.config.n_frames, 3, size, size)
    peft_model = loaded_by_peft(model.eval(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft_model(frames), model(frames), atol=1e-4, rtol=1e-4)


def test_the_module_does_not_load_peft():
    code = (
        "import sys, torch; import tvit_cli.model.lora, tvit_cli.model.folder;"
        "sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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


def test_frozen_parts_get_no_gradient_and_changed_inputs_are_noticed():
    inputs = tensors()
    inputs[0].requires_grad_(False)
    lora_linear(*inputs, scale=1.0, dropout=0.1).sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [True, True, True, False, False]
    inputs = tensors()
    x = inputs[0].detach().clone()
    output = lora_linear(x, *inputs[1:], scale=1.0)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


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

    def kept(before=lambda x: x, **facts):
        return saved_bytes(lambda: lora_linear(before(x), *weights, scale=1.0, **facts), without=weights)

    product, lora_a, lora_b = 64 * 4, 4 * 256, 128 * 4
    assert kept() == 4 * (x.numel() + product)
    assert kept(dropout=0.1) == kept() + x.numel()
    assert kept(F.gelu) - kept(gelu="none") == 4 * x.numel()  # one that is taken over keeps nothing
    assert kept(layers.BlockNorm(256)) == kept() + 4 * (2 * 64 + 2 * 256)  # mean, deviation, weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept() == 2 * (x.numel() + product + lora_a + lora_b)  # no copy of the frozen weight
    with torch.no_grad():
        assert saved_bytes(lambda: lora_linear(x, *weights, scale=1.0, dropout=0.1), without=[]) == 0


def test_attention_keeps_one_input_under_autocast_and_needs_none():
    config = ViTConfig(num_classes=2, frame_size=16, patch_size=8, n_frames=2, width=32, depth=1, num_heads=2)
    model = build_model(config, seed=0, from_scratch=True)
    other = build_model(config, seed=0, from_scratch=True).to("meta")  # a device that autocast does not know
    assert other(torch.empty(1, 2, 3, 16, 16, device="meta")).shape == (1, 2)
    lora.attach(model.train(), lora.LoraSpec(2, 4, 0.0, False, "none", ("q", "k", "v"), ()), seed=0)
    kept = {}

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape == (1, 1, 9, 32):
            kept[tensor.data_ptr()] = tensor
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with torch.autocast("cpu", dtype=torch.bfloat16), saved:
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


def test_the_faster_of_bytes_and_floats_is_found_out(monkeypatch):
    multiply = torch._int_mm

    def slow(*factors):
        time.sleep(0.05)
        return multiply(*factors)

    monkeypatch.setattr(torch, "_int_mm", slow)
    assert not linear.is_fast()
    monkeypatch.setattr(torch, "_int_mm", lambda *factors: None)
    assert linear.is_fast()


def test_int8_is_exact_for_whole_numbers_and_keeps_zeros():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, -3, 0], [0.5, 63.5, -1]]))  # scales 1 and 0.5
        layer.bias.copy_(torch.tensor([1.0, -2]))
    x = torch.tensor([[127.0, 1, 2], [-254, 4, 6]])  # scales 1 and 2
    assert torch.equal(Int8Linear(layer)(x), layer(x).detach())
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


def test_bfloat16_gradients_of_adapters_are_summed_in_float32(monkeypatch):
    """In chunks on a CPU: the sum is as exact as that in one piece, which no chunk is added to in bfloat16."""
    random = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*size, generator=random) for size in ((4096, 16), (16, 16), (16,), (2, 16), (16, 2))
    ]
    inputs[0] += 1  # values of one sign add up
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    (right,) = gradients(lora_linear(*exact, scale=1.0), [exact[3]])
    errors = []
    for size in (2**18, 2**8):
        monkeypatch.setattr(linear, "CHUNK", size)
        low = [tensor.bfloat16().requires_grad_() for tensor in inputs]
        (found,) = gradients(lora_linear(*low, scale=1.0), [low[3]])
        errors.append(float((found.double() - right).norm() / right.norm()))
    assert errors[1] < 1.1 * errors[0]
