"""One forward pass in 8 bits on a CPU beside float32 and bf16, with nothing but torch.

    python tests/bench/int8.py [--rounds 3] [--threads 2] [--size base] [--data FOLDER --weights FOLDER]

ViT-B (or small: ViT-S), 8 frames of 224 pixels, random weights, no gradients; processor seconds, medians of ratios of
passes taken in turn. `ao` is torch.ao.quantization.quantize_dynamic on all Linear layers (weights and activations by
the range of the whole tensor), `tvit` what `tvit predict --int8` does (weights by row, activations by token); `bf16` is autocast, `bf16 weights` the model itself in bf16. The agreement is that of the best classes
of the test videos in --data, by a trained --model; or, by the --weights of a pretrained ViT, of the classes whose
other videos' features are most like a video's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from step import in_turn
from torch import Tensor, nn
from torch.nn import functional as F

from tvit_cli import __version__
from tvit_cli.data.layout import read_layout
from tvit_cli.engine.evaluate.scoring import score
from tvit_cli.engine.train.build import build
from tvit_cli.engine.trained import open_trained
from tvit_cli.model.linear import to_int8
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import silent
from tvit_cli.settings.train import TrainSettings

SIZES = {"base": (768, 12, 12), "small": (384, 12, 6)}


def with_int8(model: nn.Module) -> nn.Module:
    changed = copy.deepcopy(model)
    to_int8(changed, but="classifier")
    return changed


class Autocast(nn.Module):
    """A model in bf16 autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.model(clips)
        return logits.float()


class Half(Autocast):
    """A model whose weights are bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(copy.deepcopy(model).to(torch.bfloat16))

    def forward(self, clips: Tensor) -> Tensor:
        logits: Tensor = self.model(clips.to(torch.bfloat16))
        return logits.float()


def variants(model: nn.Module) -> dict[str, nn.Module]:
    return {
        "float32": model,
        "bf16": Autocast(model),
        "bf16 weights": Half(model),
        "ao": torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8),
        "tvit": with_int8(model),
    }


@torch.inference_mode()
def measure_speed(size: str, rounds: int) -> dict[str, dict[str, float]]:
    """Per variant: times faster than float32 by processor and by the clock, and processor seconds."""
    width, depth, heads = SIZES[size]
    config = ViTConfig(num_classes=101, width=width, depth=depth, num_heads=heads)
    models = variants(build_model(config, seed=0, from_scratch=True).eval())
    clips = torch.randn(1, config.n_frames, 3, 224, 224)
    times = in_turn({name: partial(model, clips) for name, model in models.items()}, rounds)

    def ratio(name: str, clock: int) -> float:
        pairs = zip(times["float32"], times[name], strict=True)
        return statistics.median(whole[clock] / took[clock] for whole, took in pairs)

    return {
        name: {
            "times_faster": ratio(name, 0),
            "times_faster_wall": ratio(name, 1),
            "cpu_seconds": statistics.median(cpu for cpu, _ in took),
        }
        for name, took in times.items()
    }


def measure_agreement(data: Path, weights: Path | None, model: Path | None) -> dict[str, dict[str, float]]:
    """Per variant: share of videos with the class that float32 gives them, and with their own."""
    layout = read_layout(data, group_pattern="$^", val_groups="none", test_groups="none")
    videos = layout.subset("test") or layout.videos
    if model is not None:
        trained = open_trained(model, working_directory=Path(), device=torch.device("cpu"))
        network, preprocessing, labels = trained.model, trained.card.preprocessing, trained.card.labels
    else:
        settings = TrainSettings(
            hf_model_name=str(weights), train="classifier", img_size=98, resize="squash", n_frames=8
        )
        built = build(settings, num_classes=len(layout.labels), report=silent)
        network, preprocessing, labels = built.model, built.preprocessing, layout.labels
        network.classifier = nn.Identity()  # what is classified comes out
    found = {}
    for name, variant in variants(network.eval()).items():
        scores = score(
            variant, videos, labels, preprocessing, device=torch.device("cpu"), batch_size=1, workers=0
        )
        rows = scores.logits if weights is None else likeness(scores.logits, scores.labels)
        found[name] = (rows.argmax(1), scores.labels)
    return {
        name: {
            "agrees": float((classes == found["float32"][0]).float().mean()),
            "top1": float((classes == right).float().mean()),
        }
        for name, (classes, right) in found.items()
    }


def likeness(features: Tensor, labels: Tensor) -> Tensor:
    """How like each video (V, D) is to the others of each class: cosines of what is not common to all, (V, K)."""
    own = F.normalize(features - features.mean(0), dim=1)
    cosines = (own @ own.T).fill_diagonal_(0)  # a video is not compared with itself
    members = F.one_hot(labels).float()
    return cosines @ members / (members.sum(0) - members)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--data", type=Path, help="class folders of videos")
    parser.add_argument(
        "--weights", type=Path, help="folder of a pretrained ViT, for the agreement on --data"
    )
    parser.add_argument("--model", type=Path, help="folder of a trained model, for the agreement on --data")
    options = parser.parse_args()
    if (options.data is not None) != ((options.weights is None) != (options.model is None)):
        parser.error("--data goes with one of --weights and --model")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # torch.ao is deprecated
    results = measure_speed(options.size, options.rounds)
    agreement = {}
    if options.data is not None:
        agreement = measure_agreement(options.data, options.weights, options.model)
    for name, row in results.items():
        row |= agreement.get(name, {})
        print(f"{name:13}", *(f"{k} {v:.3f}" for k, v in row.items()))
    facts = {"tvit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"threads": options.threads, "size": options.size}
    print(json.dumps({"benchmark": "int8", **facts, "results": results}))


if __name__ == "__main__":
    main()
