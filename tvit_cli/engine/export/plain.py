"""`--format safetensors`: merged weights, the card, and the files of the network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tvit_cli.engine.export.formats import Answerer, Format, Job, import_source, read_frames, ship_package
from tvit_cli.model.folder import CARD_FILE, WEIGHTS_FILE, save_tensors, sha256


def write(job: Job, folder: Path) -> None:
    """Write model.safetensors, card.json and the package `source`."""
    state = {name: tensor.contiguous() for name, tensor in job.trained.model.state_dict().items()}
    save_tensors(state, folder / WEIGHTS_FILE, {"format": "pt"})
    job.write_card(folder, weights_sha256=sha256(folder / WEIGHTS_FILE))
    ship_package(folder)


@contextmanager
def opened(folder: Path) -> Iterator[Answerer]:
    """The exported model, from its own files alone."""
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    with import_source(folder) as module:
        config = module("config").ViTConfig.from_dict(card["model"])
        model = module("vit").TemporalViT(config, initialise=False).eval()
        model.load_state_dict(load_file(folder / WEIGHTS_FILE), assign=True)

        @torch.inference_mode()
        def answer(videos: Sequence[Path]) -> Tensor:
            facts = card["preprocessing"]
            rows = []
            for video in videos:
                (frames,) = torch.from_numpy(read_frames(module("reading"), video, facts))
                clip = module("preprocessing").frames_to_input(
                    frames.permute(0, 3, 1, 2),
                    **{key: facts[key] for key in ("frame_size", "resize", "scale_to", "mean", "std")},
                )
                rows.append(model(clip[None])[0])
            return torch.stack(rows)

        yield answer


FORMAT = Format(write, opened, packages=("torch", "safetensors"), library="pytorch")
