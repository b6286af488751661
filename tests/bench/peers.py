"""One training step of tvit beside transformers' video models with PEFT: the same width, depth, tokens and rank.

    python tests/bench/peers.py [--rounds 3] [--threads 2] [--depth 4] [--dropout 0.1]

VideoMAE and ViViT attend jointly over tubelets of 2 frames (16 frames of 224 pixels: 1,568 tokens), as `joint` with
`--tubelet-size 2`; TimeSformer attends by `divided` over 8 single frames (1,568 tokens too). All have rank 4 on the
layers that make queries, keys and values, those of attention over time included, and on both of the MLP. VideoMAE
classifies the mean of the patches, and so does tvit beside it; the others the class token. Random weights, ViT-B's width, a slice of its depth; forward and backward, one clip. Steps are
taken in turn, seconds are processor time; memory is what autograd holds when the forward pass ends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from step import RANK, SCALE, TARGETS, in_turn
from torch import Tensor, nn
from torch.nn import functional as F

from tvit_cli import __version__
from tvit_cli.model import lora
from tvit_cli.model.vit import ViTConfig, build_model

WIDTH, HEADS, CLASSES = 768, 12, 101


def ours(attention: str, frames: int, tubelet: int, pool: str, depth: int, dropout: float) -> nn.Module:
    config = ViTConfig(
        num_classes=CLASSES, n_frames=frames, tubelet_size=tubelet, width=WIDTH, depth=depth, num_heads=HEADS,
        attention=attention, pool=pool,
    )  # fmt: skip
    model = build_model(config, seed=0, from_scratch=True)
    lora.attach(model, lora.LoraSpec(RANK, RANK * SCALE, dropout, False, "none", TARGETS, ()), seed=0)
    return model.train()


def peer(name: str, depth: int, dropout: float) -> nn.Module:
    import transformers
    from peft import LoraConfig, get_peft_model

    shape: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": depth, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH,
        "image_size": 224, "num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    targets = (
        r".*(query|key|value|q_proj|k_proj|v_proj|intermediate\.dense|layer\.\d+\.output\.dense|fc1|fc2)"
    )
    if name == "VideoMAE":
        config = transformers.VideoMAEConfig(num_frames=16, tubelet_size=2, patch_size=16, **shape)
        model: nn.Module = transformers.VideoMAEForVideoClassification(config)
    elif name == "ViViT":
        config = transformers.VivitConfig(num_frames=16, tubelet_size=[2, 16, 16], **shape)
        model = transformers.VivitForVideoClassification(config)
    else:
        config = transformers.TimesformerConfig(num_frames=8, patch_size=16, **shape)
        model = transformers.TimesformerForVideoClassification(config)
        targets = r".*(qkv|intermediate\.dense|layer\.\d+\.output\.dense|fc1|fc2)"
    wrapped = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=RANK * SCALE, lora_dropout=dropout, target_modules=targets,
                   modules_to_save=["classifier"]),
    )  # fmt: skip
    return wrapped.train()


def step_of(model: nn.Module, clips: Tensor) -> Callable[[], None]:
    label = torch.zeros(1, dtype=torch.int64)

    def step() -> None:
        out = model(clips)
        F.cross_entropy(out if isinstance(out, Tensor) else out.logits, label).backward()
        model.zero_grad(set_to_none=True)

    return step


def saved_megabytes(model: nn.Module, clips: Tensor) -> float:
    """What autograd holds after a forward pass, weights left out."""
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
        model(clips)
    return sum(saved.values()) / 2**20


def adapted(model: nn.Module) -> int:
    """Layers with an adapter."""
    return sum(name.endswith("lora_A.default") for name, _ in model.named_modules())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # transformers warns of optional packages
    import transformers

    results = {}
    for name, attention, frames, tubelet, pool in (
        ("VideoMAE", "joint", 16, 2, "mean"),
        ("ViViT", "joint", 16, 2, "class"),
        ("TimeSformer", "divided", 8, 1, "class"),
    ):
        clips = torch.randn(1, frames, 3, 224, 224)
        models = {
            "tvit": ours(attention, frames, tubelet, pool, options.depth, options.dropout),
            "peer": peer(name, options.depth, options.dropout),
        }
        steps = {kind: step_of(model, clips) for kind, model in models.items()}
        times = {kind: [cpu for cpu, _ in took] for kind, took in in_turn(steps, options.rounds).items()}
        ratio = statistics.median(p / t for p, t in zip(times["peer"], times["tvit"], strict=True))
        memory = {kind: saved_megabytes(model, clips) for kind, model in models.items()}
        results[name] = {
            "times_faster": ratio,
            "memory_ratio": memory["tvit"] / memory["peer"],
            "tvit_seconds": statistics.median(times["tvit"]),
            "tvit_megabytes": memory["tvit"],
            "adapters": {kind: adapted(model) for kind, model in models.items()},
        }
        print(
            f"{name:12} {attention:8} x {ratio:.2f}, memory x {memory['tvit'] / memory['peer']:.2f}, "
            f"adapters {results[name]['adapters']}", flush=True,
        )  # fmt: skip
    versions = {"tvit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    facts = {"python": platform.python_version(), "threads": options.threads, "depth": options.depth}
    print(
        json.dumps(
            {"benchmark": "peers", **versions, **facts, "dropout": options.dropout, "results": results}
        )
    )


if __name__ == "__main__":
    main()
