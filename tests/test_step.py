"""Training steps on an accelerator: no read of a device value, few launches, frozen weights in autocast's format."""

from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from tiny import MIXED, settings
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tvit_cli.engine.train as package
from tvit_cli.engine.train import set_up
from tvit_cli.engine.train.loop import forward_backward, remaining_batches, update
from tvit_cli.model import linear, lora
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import silent

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
    clips, labels = torch.zeros(2, 2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    with Launches() as launched:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(clips)
        F.cross_entropy(logits, labels).backward()
    return launched.counts.total()


MOST_LAUNCHES = {
    "q, k, v": (1311, {}),
    "with the MLP": (1827, {"targets": ("q", "k", "v", "fc1", "fc2")}),
    "all weights": (850, {"train": "all"}),
    "divided": (2462, {"attention": "divided"}),
}


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_pass_under_autocast_launches_few_kernels(name, monkeypatch):
    most, changes = MOST_LAUNCHES[name]
    assert launches(monkeypatch, **changes) <= most
