"""Tiny data and models, short training runs, and readers of their results."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.train import train
from tvit_cli.model.folder import save_model
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import TrainResult
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.train import TrainSettings

Run = Callable[..., TrainResult]  # the fixture `trained`
DEVICE = os.environ.get("TVIT_TEST_DEVICE", "cpu")
COLOURS = {"Blue": (40, 60, 200), "Green": (50, 190, 60), "Red": (200, 50, 40)}
WIDTH = 16
SCRATCH = {"hf_model_name": None, "width": 16, "depth": 1, "num_heads": 2, "train": "all"}
# Random draws per clip and mixes of two clips: independent of micro-batches and world size.
MIXED = {"mixup": 0.8, "cutmix": 1.0, "randaugment": 2, "random_erasing": 0.5, "label_smoothing": 0.1}


def make_clips(root: Path, *, groups: int = 6) -> Path:
    """Three classes of one clip per group: a coloured square on noise, brighter on the left."""
    for label, colour in COLOURS.items():
        for group in range(1, groups + 1):
            generator = np.random.default_rng([group, *colour])
            frames = generator.integers(60, 120, (6, 40, 48, 3))
            frames[:, :, :24] += 40
            for i in range(6):
                frames[i, 10:30, 4 + 4 * i : 20 + 4 * i] = colour
            path = root / label / f"v_{label}_g{group:02d}_c01.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, frames.astype(np.uint8))
    return root


def make_pretrained(folder: Path) -> Path:
    """A Hugging Face ViT folder with random weights: width 16, depth 2, patches of 16, frames of 32."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {
        "embeddings.cls_token": random(1, 1, WIDTH),
        "embeddings.position_embeddings": random(1, 5, WIDTH),
        "embeddings.patch_embeddings.projection.weight": random(WIDTH, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": random(WIDTH),
        "layernorm.weight": 1 + random(WIDTH),
        "layernorm.bias": random(WIDTH),
    }
    for n in range(2):
        block = f"encoder.layer.{n}"
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            tensors |= {f"{block}.{name}.weight": random(WIDTH, WIDTH), f"{block}.{name}.bias": random(WIDTH)}
        tensors |= {
            f"{block}.attention.output.dense.weight": random(WIDTH, WIDTH),
            f"{block}.attention.output.dense.bias": random(WIDTH),
            f"{block}.intermediate.dense.weight": random(32, WIDTH),
            f"{block}.intermediate.dense.bias": random(32),
            f"{block}.output.dense.weight": random(WIDTH, 32),
            f"{block}.output.dense.bias": random(WIDTH),
        }
        for norm in ("layernorm_before", "layernorm_after"):
            tensors |= {f"{block}.{norm}.weight": 1 + random(WIDTH), f"{block}.{norm}.bias": random(WIDTH)}
    config = {
        "model_type": "vit", "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "patch_size": 16, "image_size": 32, "num_channels": 3, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "qkv_bias": True,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_model(folder: Path, labels: Sequence[str]) -> Path:
    """A model folder whose weights were drawn and never trained: it answers, and knows nothing."""
    config = ViTConfig(
        num_classes=len(labels), frame_size=32, patch_size=8, n_frames=4, width=8, depth=1, num_heads=1
    )
    card = ModelCard(
        tvit_version="0", labels=tuple(labels), model=config.to_dict(),
        preprocessing=Preprocessing(n_frames=4, frame_size=32), weights_sha256="",
    )  # fmt: skip
    save_model(folder, build_model(config, seed=0, from_scratch=True).state_dict(), card)
    return folder


def change_weights(folder: Path, **changes: torch.Tensor) -> None:
    """Other tensors in a model folder, with their hash on the card."""
    path, card = folder / "model.safetensors", folder / "card.json"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({**tensors, **changes}, path, metadata={"format": "pt"})
    facts = {**json.loads(card.read_text()), "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    card.write_text(json.dumps(facts))


def settings(**changes: Any) -> TrainSettings:
    """Settings for a run of a second; paths and the pretrained model come in `changes`."""
    facts: dict[str, Any] = {
        "img_size": 32, "n_frames": 4, "epochs": 2, "per_gpu_batch_size": 4, "num_workers": 0,
        "device": DEVICE, "learning_rate": 0.01, "top_k": 2, "val_groups": "1", "test_groups": "1", **changes,
    }  # fmt: skip
    if facts["device"] != "cpu":  # else equal runs would not have equal bits
        facts = {"deterministic": True, "mixed_precision": "no", **facts}
    return TrainSettings.model_validate(facts)


def run(**changes: Any) -> TrainResult:
    """Train with `settings`."""
    return train(settings(**changes))


def records(result: TrainResult, kind: str = "epoch") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind (`""`: all), without measured times."""
    clock = ("seconds", "clips_per_second", "data_wait")
    lines = map(json.loads, (result.run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if kind in ("", line["kind"])]


def run_in(folder: Path) -> TrainResult:
    """A run that another process trained, as its result."""
    return TrainResult(folder, folder / "model", 0, {}, None)


def last_weights(result: TrainResult) -> dict[str, torch.Tensor]:
    """The trainable tensors of a run's last checkpoint."""
    return load_file(sorted((result.run / "checkpoints").glob("step-*"))[-1] / "trainable.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
