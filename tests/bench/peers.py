"""One training step of tvit beside transformers' video models with PEFT: the same width, depth, tokens and rank.

    python tests/bench/peers.py [--rounds 3] [--threads 2] [--depth 4] [--dropout 0.1,0] [--only VideoMAE,…]

VideoMAE and ViViT have tubelets of 2 frames (16 frames of 224 pixels: 1,568 tokens) and one table of positions, and
so has tvit beside them, as it loads their weights; V-JEPA 2 has ViT-L's width, 16 frames of 256 pixels (2,048 tokens)
and rotary positions; TimeSformer attends by `divided` over 8 single frames (1,568 tokens too). All have rank 4 on the
layers that make queries, keys and values, those of attention over time included, and on both of the MLP. VideoMAE
and tvit's V-JEPA 2 classify the mean of the patches, transformers' V-JEPA 2 by its own pooling blocks, which the
benchmark leaves out; the others the class token. Random weights, a slice of the depth (half of it for V-JEPA 2);
forward and backward, one clip. Steps are taken in turn, seconds are processor time (wall
seconds stand beside them); memory is what autograd holds when the forward pass ends.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from step import RANK, SCALE, TARGETS, forward_and_held, in_turn, step_of
from torch import nn

from tvit_cli import __version__
from tvit_cli.model import lora
from tvit_cli.portable.vit import ViTConfig, build_model

WIDTH, HEADS, CLASSES = 768, 12, 101
VIDEO = {"n_frames": 16, "tubelet_size": 2, "class_token": False, "pool": "mean"}
PEERS: dict[str, dict[str, Any]] = {  # tvit's own network for each
    "VideoMAE": {**VIDEO, "positions": "joint", "norm": "pooled"},
    "V-JEPA 2": {**VIDEO, "positions": "rotary", "frame_size": 256, "width": 1024, "num_heads": 16},
    "ViViT": {"n_frames": 16, "tubelet_size": 2, "positions": "joint", "activation": "gelu_tanh"},
    "TimeSformer": {"n_frames": 8, "attention": "divided"},
}


def ours(name: str, depth: int, dropout: float) -> nn.Module:
    config = ViTConfig(
        **{"num_classes": CLASSES, "width": WIDTH, "num_heads": HEADS, "depth": depth, **PEERS[name]}
    )
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
    elif name == "V-JEPA 2":
        config = transformers.VJEPA2Config(
            frames_per_clip=16, hidden_size=1024, num_hidden_layers=depth, num_attention_heads=16, num_labels=CLASSES,
        )  # fmt: skip
        model, targets = MeanPooled(transformers.VJEPA2Model(config)), r".*(query|key|value|fc1|fc2)"
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


class MeanPooled(nn.Module):
    """A classifier of the mean of V-JEPA 2's tokens, without its predictor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.classifier = nn.Linear(1024, CLASSES)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.encoder(clips).last_hidden_state.mean(1))


def adapted(model: nn.Module) -> int:
    """Layers with an adapter."""
    return sum(name.endswith("lora_A.default") for name, _ in model.named_modules())


def compare(name: str, depth: int, dropout: float, rounds: int) -> dict[str, Any]:
    """How many times faster tvit's step is than a peer's, by processor and by the clock, and what is held."""
    depth = depth // 2 if name == "V-JEPA 2" else depth
    size = PEERS[name].get("frame_size", 224)
    clips = torch.randn(1, PEERS[name]["n_frames"], 3, size, size)
    models = {"tvit": ours(name, depth, dropout), "peer": peer(name, depth, dropout)}
    times = in_turn({kind: step_of(model, clips) for kind, model in models.items()}, rounds)
    pairs = list(zip(times["peer"], times["tvit"], strict=True))
    saved = {kind: forward_and_held(model, clips)[1] for kind, model in models.items()}
    return {
        "times_faster": statistics.median(theirs[0] / own[0] for theirs, own in pairs),
        "times_faster_wall": statistics.median(theirs[1] / own[1] for theirs, own in pairs),
        "memory_ratio": saved["tvit"] / saved["peer"],
        "tvit_seconds": statistics.median(own[0] for _, own in pairs),
        "tvit_megabytes": saved["tvit"],
        "adapters": {kind: adapted(model) for kind, model in models.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dropout", default="0.1,0")
    parser.add_argument("--only", default=",".join(PEERS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # transformers warns of optional packages
    import transformers

    results = {}
    for dropout in map(float, options.dropout.split(",")):
        for name in options.only.split(","):
            row = compare(name, options.depth, dropout, options.rounds)
            results[f"{name}, dropout {dropout:g}"] = row
            print(
                f"{name:12} dropout {dropout:<4g} x {row['times_faster']:.2f} (by the clock "
                f"{row['times_faster_wall']:.2f}), memory x {row['memory_ratio']:.2f}, adapters {row['adapters']}",
                flush=True,
            )
    versions = {"tvit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    facts = {"python": platform.python_version(), "threads": options.threads, "rounds": options.rounds}
    facts |= {"depth": options.depth, "results": results}
    print(json.dumps({"benchmark": "peers", **versions, **facts}))


if __name__ == "__main__":
    main()
