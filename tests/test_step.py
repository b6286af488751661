"""Training steps on an accelerator: no read of a device value, few launches, frozen weights in autocast's format."""

import json
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from tiny import MIXED, run, same, settings
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tvit_cli.engine.train as package
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.predict.model import open_model
from tvit_cli.engine.train import set_up
from tvit_cli.engine.train.loop import forward_backward, remaining_batches, update
from tvit_cli.errors import ModelError
from tvit_cli.model import linear, lora
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import silent
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.predict import PredictSettings

MODEL = "model.safetensors"
# Operations that launch nothing: memory is reserved, or seen with another shape.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
    "expand", "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
STEPS = {
    "lora": {"attention": "divided", "lora_target_modules": ("q", "fc1", "fc2"), "token_drop": 0.5},
    "all": {"attention": "factorized", "train": "all", "drop_path": 0.1, "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("name", STEPS)
def test_step_reads_no_value_of_the_device(name, inputs, tmp_path, monkeypatch):
    """Tensors on the meta device have no values, so a read raises."""
    meta, real = torch.device("meta"), package.make_accelerator

    def on_meta(**options):
        accelerator = real(**options)
        for shared in (PartialState._shared_state, AcceleratorState._shared_state):
            monkeypatch.setitem(shared, "device", meta)
        return accelerator

    monkeypatch.setattr(package, "make_accelerator", on_meta)
    monkeypatch.setattr(package, "adamw", lambda groups, **_: torch.optim.AdamW(groups))  # no fused one there
    own = settings(**inputs, working_directory=tmp_path, ema_decay=0.9, epochs=1, **MIXED, **STEPS[name])
    loop = set_up(own, silent, standardises=False)
    loop.samples = SimpleNamespace(are_wanted=False)  # those of the report are copied to the host
    with closing(remaining_batches(loop)) as batches:
        for planned, batch in batches:
            loss, norm = forward_backward(loop, planned, batch), update(loop)
            loop.step += planned.ends_step
            assert loss.device == norm.device == loop.tally.sums.device == meta
    assert loop.step == 3


class Launches(TorchDispatchMode):
    """Counts operations by name, without VIEWS."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.counts[name] += name not in VIEWS
        return operation(*args, **(kwargs or {}))


def launches(monkeypatch, *, targets=("q", "k", "v"), train="lora", **config):
    """Launches of one pass of a ViT-B's layers, forward and backward, as an accelerator takes it in bfloat16."""
    monkeypatch.setattr(linear, "CHUNK", 2**40)  # only CPUs compute a layer in pieces and draw masks bytewise

    def draw_mask(count, dropout, device):
        return torch.empty(count, dtype=torch.uint8).bernoulli_(1 - dropout)

    monkeypatch.setattr(linear, "draw_mask", draw_mask)
    shape = ViTConfig(num_classes=5, n_frames=2, frame_size=32, width=24, depth=12, num_heads=12, **config)
    model = build_model(shape, seed=0, from_scratch=True).train()
    spec = lora.LoraSpec(4, 8, 0.1, False, "none", targets, ())
    lora.set_trainable(model, train, spec, seed=0)
    linear.hold_frozen(model, torch.bfloat16, exclude=model.classifier.modules())
    linear.cast_adapters(model, lora.ADAPTER)
    clips, labels = torch.zeros(2, 2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    with Launches() as launched:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(clips)
        F.cross_entropy(logits, labels).backward()
    return launched.counts.total()


MOST_LAUNCHES = {
    "q, k, v": (950, {}),
    "with the MLP": (1322, {"targets": ("q", "k", "v", "fc1", "fc2")}),
    "all weights": (850, {"train": "all"}),
    "divided": (1789, {"attention": "divided"}),
}


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_pass_under_autocast_launches_few_kernels(name, monkeypatch):
    most, changes = MOST_LAUNCHES[name]
    assert launches(monkeypatch, **changes) <= most


def low_precision_pass(inputs, folder, **changes):
    """Logits, gradients, and bytes of frozen matrices after one pass in bfloat16."""
    own = settings(**inputs, working_directory=folder, mixed_precision="bf16", **changes)
    loop = set_up(own, silent, standardises=False)
    model = loop.model.train()
    torch.manual_seed(0)
    with loop.accelerator.autocast():
        logits = model(torch.rand(2, 4, 3, 32, 32) * 2 - 1)
    logits.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1 and len(p) > 1]
    return logits.detach(), grads, sum(p.numel() * p.element_size() for p in frozen)


FROZEN = {
    "lora": {"attention": "divided", "lora_target_modules": ("q", "fc1", "fc2")},
    "biases": {"lora_bias": "all", "lora_target_modules": ("v", "proj", "classifier")},
    "tubelets": {"tubelet_size": 2},
    "checkpointing": {"gradient_checkpointing": True, "lora_dropout": 0.5},
    "last block": {"train": "last-1"},
    "classifier": {"train": "classifier"},
}


@pytest.mark.parametrize("name", FROZEN)
def test_weights_held_in_bf16_keep_every_bit_of_a_pass(name, inputs, tmp_path, monkeypatch):
    logits, gradients, size = low_precision_pass(inputs, tmp_path / "a", **FROZEN[name])
    monkeypatch.setattr(package, "hold_frozen", lambda *args, **options: None)
    expected, exact, whole = low_precision_pass(inputs, tmp_path / "b", **FROZEN[name])
    assert torch.equal(logits, expected) and gradients.keys() == exact.keys()
    assert all(torch.equal(gradients[key], exact[key]) for key in exact)
    assert 0.5 * whole <= size < 0.53 * whole  # position tables and the classifier stay


@pytest.mark.parametrize("changes", [
    {}, {"lora_use_dora": True}, {"lora_init": "pissa", "lora_target_modules": ("q",)},
    {"tubelet_size": 2, "gradient_checkpointing": True, "ema_decay": 0.5}, {"train": "last-1"},
], ids=["lora", "dora", "pissa", "tubelets", "last block"])  # fmt: skip
def test_adapters_are_merged_into_the_float32_weights(changes, inputs, tmp_path, monkeypatch):
    own = {**inputs, **changes, "mixed_precision": "bf16"}
    found = run(**own, working_directory=tmp_path / "a")
    monkeypatch.setattr(package, "hold_frozen", lambda *args, **options: None)
    expected = run(**own, working_directory=tmp_path / "b")
    assert same(load_file(found.model / MODEL), load_file(expected.model / MODEL))


def test_merging_refuses_base_weights_that_have_changed(inputs, tmp_path, monkeypatch):
    weights = Path(inputs["hf_model_name"])
    copy = Path(shutil.copytree(weights, tmp_path / "weights"))
    original = package._finish

    def finish(loop):
        tensors = load_file(copy / MODEL)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / MODEL)
        return original(loop)

    monkeypatch.setattr(package, "_finish", finish)
    with pytest.raises(ModelError, match="changed since the training started"):
        run(**{**inputs, "hf_model_name": str(copy)}, working_directory=tmp_path, mixed_precision="bf16")


def test_adapters_cast_together_are_cast_anew_in_each_pass(inputs, tmp_path):
    loop = set_up(settings(**inputs, working_directory=tmp_path, mixed_precision="bf16"), silent)
    clips = torch.rand(2, 4, 3, 32, 32)

    def logits():
        with torch.no_grad(), loop.accelerator.autocast():
            return loop.model.eval()(clips)

    before, layers = logits(), lora.adapted_layers(loop.plain_model).values()
    with torch.no_grad():
        for layer in layers:
            layer.lora_B[lora.ADAPTER].weight.data.fill_(0.1)
    assert not torch.equal(logits(), before) and all(layer.cast is None for layer in layers)


@pytest.mark.parametrize(
    ("precision", "speedup", "says"), [("auto", 3.0, 1), ("auto", 1.9, 0), ("no", 3.0, 0)]
)
def test_auto_is_bf16_on_processors_that_multiply_it_faster(
    precision, speedup, says, inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(package, "bf16_speedup", lambda width: speedup)
    events = []
    own = settings(**inputs, working_directory=tmp_path, mixed_precision=precision)
    chosen = set_up(own, events.append)
    assert chosen.settings.mixed_precision == chosen.accelerator.mixed_precision == ("bf16" if says else "no")
    assert (
        sum("times as fast as float32: --mixed-precision bf16." in getattr(e, "text", "") for e in events)
        == says
    )


@pytest.mark.parametrize("first", ["bf16", "no"])
def test_auto_resumes_in_the_format_of_the_checkpoint(first, trained, monkeypatch):
    begun = trained(epochs=1, mixed_precision=first, experiment_name="mine")
    (begun.run / "model").rename(begun.run / "gone")
    monkeypatch.setattr(package, "bf16_speedup", lambda width: 1.0 if first == "bf16" else 9.0)
    trained(epochs=1, mixed_precision="auto", resume_from_checkpoint=str(begun.run))
    assert json.loads((begun.run / "settings.json").read_text())["mixed_precision"] == first


@pytest.mark.parametrize(
    ("given", "speedup", "expected"), [("auto", 3.0, "bf16"), ("auto", 1.9, "no"), ("no", 3.0, "no")]
)
def test_scores_and_predictions_take_the_faster_format_too(
    given, speedup, expected, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("tvit_cli.engine.trained.bf16_speedup", lambda width: speedup)
    facts = {"model": finished.model, "device": "cpu", "mixed_precision": given}
    evaluate(EvalSettings.model_validate({**facts, "output": tmp_path / "eval", "num_workers": 0}))
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["mixed_precision"] == expected
    quick = PredictSettings.model_validate({**facts, "paths": ["clip.avi"]})
    assert open_model(quick, silent)._trained.precision == expected
    assert open_model(quick.model_copy(update={"int8": True}), silent)._trained.precision == "no"


def test_bf16_speedup_compares_products_and_leaves_narrow_models_out(monkeypatch):
    def seconds(product, **how):
        return [9.0, 1.0 if product.args[0].dtype == torch.bfloat16 else 4.0]

    monkeypatch.setattr(linear.timeit, "repeat", seconds)
    assert linear.bf16_speedup(192) == 4.0 and linear.bf16_speedup(191) == 1.0
