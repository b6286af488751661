"""Adapters: exact names, what is trained, what is merged, what is saved."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tvit_cli.errors import ModelError
from tvit_cli.model.lora import (
    LoraSpec,
    attach,
    load_trainable,
    merge,
    merged_state_dict,
    resolve_layers,
    set_trainable,
    trainable_report,
    trainable_tensors,
)
from tvit_cli.model.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.settings.train import LORA_TARGETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT loads transformers, which warns of its optional dependencies
    import peft  # noqa: F401

CONFIG = ViTConfig(num_classes=5, frame_size=16, patch_size=8, n_frames=4, width=32, depth=2, num_heads=4)
FULL = {"classifier.weight", "classifier.bias", "temporal.embedding"}


def base() -> TemporalViT:
    return build_model(CONFIG, seed=0, from_scratch=True)


def spec(**changes: Any) -> LoraSpec:
    values: dict[str, Any] = {
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "targets": ("q", "k", "v"),
        "exclude": (),
    }
    return LoraSpec(**{**values, **changes})


def adapted(seed: int = 0, **changes: Any) -> TemporalViT:
    model = base()
    attach(model, spec(**changes), seed=seed)
    return model.eval()


def clips() -> torch.Tensor:
    return torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def perturb(model: nn.Module) -> None:
    """Stands in for training: an adapter starts as nothing, so that merging it would show nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def trainable(model: nn.Module) -> set[str]:
    return set(trainable_tensors(model))


def adapter_of(*layers: str) -> set[str]:
    return {f"{layer}.{part}.default.weight" for layer in layers for part in ("lora_A", "lora_B")}


def in_blocks(*layers: str) -> list[str]:
    return [f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_new_adapter_changes_nothing() -> None:
    assert torch.equal(adapted(targets=LORA_TARGETS)(clips()), base()(clips()))


def test_short_names_reach_the_layers_of_that_name_and_no_others() -> None:
    model = adapted(targets=("q", "v"))
    assert trainable(model) == FULL | adapter_of(*in_blocks("attention.q", "attention.v"))


def test_a_full_name_reaches_one_layer() -> None:
    model = adapted(targets=("blocks.1.attention.k", "fc2"))
    layers = ["blocks.1.attention.k", *in_blocks("mlp.fc2")]
    assert trainable(model) == FULL | adapter_of(*layers)


def test_every_legal_name_takes_an_adapter() -> None:
    model = adapted(targets=LORA_TARGETS)
    layers = in_blocks("attention.q", "attention.k", "attention.v", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert trainable(model) == {"temporal.embedding"} | adapter_of("patch_embed", "classifier", *layers)


def test_many_full_names_reach_their_own_layers_only() -> None:
    """PEFT shortens long lists of names to suffixes; the layers that they reach must stay the same."""
    model = build_model(ViTConfig.from_dict({**CONFIG.to_dict(), "depth": 12}), seed=0, from_scratch=True)
    names = tuple(f"blocks.{i}.attention.{layer}" for i in range(11) for layer in ("q", "k", "v"))
    attach(model, spec(targets=names), seed=0)
    assert trainable(model) == FULL | adapter_of(*names)


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
def test_a_wrong_name_is_refused_with_the_right_ones(option: str, setting: str, name: str, hint: str) -> None:
    model = base()
    with pytest.raises(ModelError, match=rf"^{setting}: '{name}' is no layer of the model\. {hint}"):
        attach(model, spec(**{option: ("q", name)}), seed=0)
    assert equal(model.state_dict(), base().state_dict())


def test_an_excluded_layer_gets_no_adapter_and_learns_in_full() -> None:
    model = adapted(targets=("q", "k"), exclude=("blocks.0.attention.q", "fc1"))
    adapters = adapter_of("blocks.1.attention.q", *in_blocks("attention.k"))
    excluded = ["blocks.0.attention.q", *in_blocks("mlp.fc1")]
    in_full = {f"{layer}.{kind}" for layer in excluded for kind in ("weight", "bias")}
    assert trainable(model) == FULL | adapters | in_full


def test_excluding_every_target_is_refused() -> None:
    with pytest.raises(ModelError, match=r"No layer is left .* lora_target_modules is q, .* is q\."):
        attach(base(), spec(targets=("q",), exclude=("q",)), seed=0)


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(ModelError, match="lora_target_modules is empty"):
        attach(base(), spec(targets=()), seed=0)


def test_biases_of_adapted_layers_learn_with_lora_only() -> None:
    model = adapted(targets=("q",), bias="lora_only")
    biases = {f"{layer}.base_layer.bias" for layer in in_blocks("attention.q")}
    assert trainable(model) == FULL | adapter_of(*in_blocks("attention.q")) | biases


def test_every_bias_learns_with_all() -> None:
    model = adapted(targets=("q",), bias="all")
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 2 + 1 + 2 * 8
    assert trainable(model) == FULL | adapter_of(*in_blocks("attention.q")) | biases


def test_an_adapter_on_the_classifier_freezes_what_is_beneath_it() -> None:
    model = adapted(targets=("classifier",))
    assert trainable(model) == {"temporal.embedding"} | adapter_of("classifier")


def test_rank_0_trains_classifier_and_temporal_embedding_without_adapters() -> None:
    model = base()
    set_trainable(model, "lora", spec(rank=0), seed=0)
    assert trainable(model) == FULL
    assert equal(model.state_dict(), base().state_dict())


def test_mode_all_trains_everything_and_mode_classifier_the_classifier_alone() -> None:
    model = base()
    set_trainable(model, "classifier", spec(), seed=0)
    assert trainable(model) == {"classifier.weight", "classifier.bias"}
    set_trainable(model, "all", spec(), seed=0)
    assert trainable(model) == set(model.state_dict())


def test_mode_lora_attaches() -> None:
    model = base()
    set_trainable(model, "lora", spec(), seed=0)
    assert equal(trainable_tensors(model), trainable_tensors(adapted()))


def test_a_step_changes_what_is_trainable_and_nothing_else() -> None:
    model = adapted(targets=("q", "patch_embed"))
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(clips()).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable(model)


def delta(**changes: Any) -> torch.Tensor:
    """What the adapter of one layer adds to its weights, from the same adapter weights each time."""
    model = adapted(targets=("q",), **changes)
    perturb(model)
    layer = "blocks.0.attention.q.weight"
    return merged_state_dict(model)[layer] - base().state_dict()[layer]


def test_alpha_over_rank_scales_an_adapter_and_rslora_divides_by_the_root_of_the_rank() -> None:
    plain = delta()
    torch.testing.assert_close(delta(alpha=16.0), 2 * plain, atol=1e-6, rtol=1e-4)
    root = delta(use_rslora=True)  # 8 / sqrt(4) where plain is 8 / 4
    torch.testing.assert_close(root, 2 * plain, atol=1e-6, rtol=1e-4)
    assert plain.abs().max() > 0.01


def test_the_rank_is_that_of_the_adapter() -> None:
    assert torch.linalg.matrix_rank(delta(rank=3), atol=1e-5) == 3


def test_dropout_acts_in_training_only() -> None:
    model = adapted(dropout=0.5)
    perturb(model)
    assert torch.equal(model(clips()), model(clips()))
    model.train()
    assert not torch.equal(model(clips()), model(clips()))


def test_adapters_depend_on_their_seed_alone_and_leave_the_global_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trainable_tensors(adapted(seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, trainable_tensors(adapted(seed=3)))
    assert not equal(first, trainable_tensors(adapted(seed=4)))


def test_the_order_of_the_targets_does_not_matter() -> None:
    assert equal(
        trainable_tensors(adapted(targets=("v", "q"))), trainable_tensors(adapted(targets=("q", "v", "q")))
    )


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_merged_model_is_a_plain_one_that_computes_the_same(bias: str) -> None:
    model = adapted(targets=LORA_TARGETS, bias=bias)
    perturb(model)
    expected = model(clips())
    assert (expected - base()(clips())).abs().max() > 1e-2
    merge(model)
    assert list(model.state_dict()) == list(base().state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in base().modules()]
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(model(clips()), expected, atol=1e-5, rtol=1e-5)


def test_merging_twice_or_without_adapters_changes_nothing() -> None:
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
def test_the_merged_state_is_what_merge_leaves_and_leaves_the_model(targets: tuple[str, ...]) -> None:
    model = adapted(targets=targets)
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in merged_state_dict(model).items()}
    assert equal(model.state_dict(), before)
    merge(model)
    assert equal(state, dict(model.state_dict()))


def test_the_merged_state_of_a_plain_model_is_its_state() -> None:
    assert equal(merged_state_dict(base()), dict(base().state_dict()))


def test_trainable_tensors_survive_the_way_into_another_model_bit_for_bit() -> None:
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
def test_trainable_tensors_of_another_model_are_refused_by_name(
    remove: str | None, add: tuple[str, torch.Tensor] | None, sentence: str
) -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
    saved = {name: tensor + 1 for name, tensor in before.items() if name != remove}
    saved.update([add] if add else [])
    with pytest.raises(ModelError, match=sentence):
        load_trainable(model, saved)
    assert equal(trainable_tensors(model), before)


def test_parameters_are_counted() -> None:
    model = adapted(targets=("q",))
    own = 2 * 4 * (32 + 32)
    total = sum(weight.numel() for weight in base().parameters())
    assert trainable_report(model) == (own + 5 * 32 + 5 + 4 * 32, total + own)


def test_layers_are_listed_in_the_order_of_the_model() -> None:
    assert resolve_layers(base(), ("v", "q"), option="x") == in_blocks("attention.q", "attention.v")


def test_the_module_does_not_load_peft() -> None:
    code = (
        "import sys, torch; import tvit_cli.model.lora, tvit_cli.model.folder;"
        "sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
