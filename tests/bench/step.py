"""Time, efficiency and memory of one training step: tvit's LoRA layers, PEFT's own, and a naive LoRA, in turn.

    python tests/bench/step.py [--rounds 3] [--threads 2] [--cases vitb2_t8,vits12_t8,…] [--only time|memory]

The same model, data and loss each time, forward and backward; only the layers differ. The naive LoRA forms A@B in
every forward pass and multiplies the dropped input by it, which lets autograd compute a gradient as large as the
frozen weights. The "plain" ones are the same layers in a ViT as it is usually written: all tokens go through its last
block, though only the class token is read. That is half of a slice of two layers and a twelfth of a whole ViT-B, so
what tvit saves by it counts for what it is in `vitb12` and `vits12` alone. The matmul rate is measured in the same
rounds, on a product of an MLP's shape. FLOPs are torch's own count, attention included and recomputation left out.
Memory: what autograd has saved when the forward pass ends ("saved"), how far the peak of a process of its own grows
during the step ("rss"), and that peak as a whole, weights and libraries included ("whole"). Seconds are the process's
CPU time over its threads, which hardly changes when others use the machine; wall seconds stand beside them.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as tvit does: else waiting threads use CPU time
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tvit_cli import __version__
from tvit_cli.model import lora
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model

TARGETS = ("q", "k", "v", "fc1", "fc2")
RANK, SCALE = 4, 2.0
SHAPES = {"vitb": (768, 12), "vits": (384, 6), "vitti": (192, 3)}
CASES = tuple(f"{model}_t{frames}" for model in ("vitb2", "vitb4", "vits12", "vitb12") for frames in (8, 18))
KINDS = ("naive", "peft", "tvit")
PLAIN = ("plain_naive", "plain_peft")
MEMORY = ("saved", "rss", "whole")
Key = TypeVar("Key")


class NaiveLora(nn.Module):
    """Frozen linear layer plus drop(x) @ (A @ B): the product of A and B is formed in every forward pass."""

    def __init__(self, base: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(base.in_features, RANK) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(RANK, base.out_features))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ (self.a @ self.b) * SCALE


def make_model(
    case: str, kind: str, dropout: float, *, token_drop: float = 0.0, **chosen: Any
) -> tuple[TemporalViT, Tensor]:
    """A model of random weights with adapters, ready to train, and a batch for it; `chosen` goes to its config."""
    plain, kind = kind.startswith("plain_"), kind.removeprefix("plain_")
    shape, frames = case.split("_t")
    name = shape.rstrip("0123456789")
    width, heads = SHAPES[name]
    depth = int(shape.removeprefix(name))
    config = ViTConfig(
        num_classes=101, n_frames=int(frames), width=width, depth=depth, num_heads=heads, **chosen
    )
    model = build_model(config, seed=0, from_scratch=True, token_drop=token_drop)
    if kind == "naive":
        model.requires_grad_(False)
        model.temporal.requires_grad_(True)
        model.classifier.requires_grad_(True)
        for path in lora.resolve_layers(model, TARGETS, option="targets"):
            model.set_submodule(path, NaiveLora(model.get_submodule(path), dropout))
    else:
        spec = lora.LoraSpec(RANK, RANK * SCALE, dropout, False, "none", TARGETS, ())
        layer = lora.own_layer if kind == "tvit" else lambda: None
        with mock.patch.object(lora, "own_layer", layer):
            lora.attach(model, spec, seed=0)
    if plain:
        model.pool.n_queries = None
    return model.train(), torch.randn(1, int(frames), 3, 224, 224)


def step_of(model: nn.Module, clips: Tensor) -> Callable[[], None]:
    """Forward, loss and backward; transformers' models give their logits a name."""
    labels = torch.zeros(len(clips), dtype=torch.int64)

    def step() -> None:
        output = model(clips)
        logits = output if isinstance(output, Tensor) else output.logits
        F.cross_entropy(logits, labels).backward()
        model.zero_grad(set_to_none=True)

    return step


def count_flops(step: Callable[[], None]) -> int:
    """Floating-point operations of a step as torch counts them, attention on a CPU added, recomputation not."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def products(q: tuple[int, ...], k: tuple[int, ...]) -> int:
        clips, heads, asking, width = q
        return 2 * clips * heads * asking * k[2] * width

    formulas = {
        cpu: lambda q, k, v, *rest, out_shape=None, **facts: 2 * products(q, k),
        backward: lambda grad, q, k, v, *rest, out_shape=None, **facts: 4 * products(q, k),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return int(counter.get_total_flops())


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def in_turn(steps: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, list[tuple[float, float]]]:
    """CPU and wall seconds of each step in each round, so that what slows the machine down slows them all."""
    times: dict[Key, list[tuple[float, float]]] = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            seconds = timed(step)
            if number:  # the first round warms up
                times[key].append(seconds)
    return times


def time_case(case: str, dropout: float, rounds: int) -> dict[str, float]:
    """Ratios of step times, and the share of the matmul rate that tvit's step reaches."""
    steps = {kind: step_of(*make_model(case, kind, dropout)) for kind in KINDS + PLAIN}
    flops = count_flops(steps["tvit"])
    a, b = torch.randn(1569, 768), torch.randn(768, 3072)
    steps["matmul"] = lambda: [a @ b for _ in range(8)]
    product = 8 * 2 * 1569 * 768 * 3072
    times = in_turn(steps, rounds)

    def ratio(kind: str, clock: int) -> float:
        return statistics.median(x[clock] / y[clock] for x, y in zip(times[kind], times["tvit"], strict=True))

    def share(clock: int) -> float:
        """Of the matmul rate of the same round."""
        pairs = zip(times["matmul"], times["tvit"], strict=True)
        return statistics.median((m[clock] / product) / (t[clock] / flops) for m, t in pairs)

    median = {
        kind: [statistics.median(t[clock] for t in values) for clock in (0, 1)]
        for kind, values in times.items()
    }
    return {
        **{kind: ratio(kind, 0) for kind in ("naive", "peft", *PLAIN)},
        "share": share(0),
        **{f"{kind}_wall": ratio(kind, 1) for kind in ("naive", "peft", *PLAIN)},
        "share_wall": share(1),
        "cpu_seconds": median["tvit"][0],
        "wall_seconds": median["tvit"][1],
        "matmul_gflops": product / median["matmul"][0] / 1e9 * torch.get_num_threads(),
    }


def measure_memory(case: str, kind: str, dropout: float) -> tuple[float, float, float]:
    """Megabytes: held by autograd after the forward pass (weights left out), growth of the process's peak, the peak."""
    model, clips = make_model(case, kind, dropout)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: building is not the step's
    before = current_memory()
    logits, saved = forward_and_held(model, clips)
    logits.sum().backward()
    peak = peak_memory()
    return saved, peak - before, peak


def forward_and_held(model: nn.Module, clips: Tensor) -> tuple[Any, float]:
    """Output of a model, and megabytes that autograd holds for it, without weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # else a freed address could be counted once for two tensors

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(clips)
    kept.clear()  # autograd holds on to `pack`, and by it they would outlive their part of the backward pass
    return output, sum(saved.values()) / 2**20


def current_memory() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_memory() -> float:
    """Megabytes, since the peak was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def memory_case(case: str, dropout: float) -> dict[str, float]:
    """Ratios to the naive LoRA, and tvit's to a plain ViT's, each kind in a process of its own."""
    results = {}
    for kind in (*KINDS, "plain_naive"):
        command = [sys.executable, __file__, "--child", case, kind, str(dropout)]
        results[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        f"{kind}_{name}": results[kind][i] / results["naive"][i]
        for kind in ("peft", "tvit")
        for i, name in enumerate(MEMORY)
    } | {
        key: value
        for i, name in enumerate(MEMORY)
        for key, value in (
            (f"tvit_{name}_plain", results["tvit"][i] / results["plain_naive"][i]),
            (f"naive_{name}_mb", results["naive"][i]),
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--dropout", default="0.1,0")
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # PEFT loads transformers, which warns of optional packages
    if options.child:
        case, kind, dropout = options.child
        print(json.dumps(measure_memory(case, kind, float(dropout))))
        return
    results: dict[str, dict[str, float]] = {}
    for case in options.cases.split(","):
        for dropout in map(float, options.dropout.split(",")):
            found: dict[str, float] = {}
            if options.only != "memory":
                found |= time_case(case, dropout, options.rounds)
            if options.only != "time":
                found |= memory_case(case, dropout)
            results[f"{case}, dropout {dropout:g}"] = found
            print(f"{case:12} dropout {dropout:<4g}", *(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
    facts = {"threads": options.threads, "rounds": options.rounds, "tvit": __version__}
    facts |= {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "step", **facts, "results": results}))


if __name__ == "__main__":
    main()
