"""What a classifier sees of videos, as a file for search and clustering."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tvit_cli.data.whole import whole_file
from tvit_cli.errors import RunError
from tvit_cli.model.folder import save_tensors


def write_embeddings(path: Path, embeddings: Sequence[tuple[str, Tensor]], model: Path) -> None:
    """Write `features`, (V, D) float32, with the videos' `names` (a JSON list) and the model in the metadata.

    A video that was named twice has two rows. Raises RunError where the file cannot be written; then what was
    there before is as it was.
    """
    from safetensors import SafetensorError

    names, rows = zip(*embeddings, strict=True)
    metadata = {"names": json.dumps(names, ensure_ascii=False), "model": str(model)}
    try:
        with whole_file(path) as beside:
            save_tensors({"features": torch.stack(rows)}, beside, metadata)
    except (OSError, SafetensorError) as error:
        raise RunError(f"--embeddings {path}: cannot be written ({error}).") from error
