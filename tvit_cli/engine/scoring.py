"""A model run over videos: one deterministic view of each, logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tvit_cli.data.clips import ClipBatch, ClipDataset, ClipItem, collate, ignore_stop_signals
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video
from tvit_cli.data.transforms import eval_transform
from tvit_cli.errors import RunError
from tvit_cli.settings.card import Preprocessing


@dataclass(frozen=True)
class Scores:
    """Logits (V, K) float32 and labels (V,) of the videos that could be read, and why the others could not.

    `indices` (V,) says which of the videos each row belongs to, ascending; `errors` maps the index of an
    unreadable video to the reason.
    """

    indices: Tensor
    logits: Tensor
    labels: Tensor
    errors: dict[int, str]


@torch.inference_mode()
def score(
    model: nn.Module,
    videos: Sequence[Video],
    labels: Sequence[str],
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    rank: int = 0,
    processes: int = 1,
    shuffle_seed: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    store: FrameStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score this process's share of the videos: every `processes`-th, from `rank` on."""
    dataset = ClipDataset(
        videos,
        labels,
        n_frames=preprocessing.n_frames,
        short_side=preprocessing.frame_size,
        seed=shuffle_seed or 0,
        training=False,
        shuffle_frames=shuffle_seed is not None,
        store=store,
        grid=preprocessing.frame_grid,
    )
    keys = [(0, index) for index in range(rank, len(videos), processes)]
    loader: DataLoader[ClipItem] = DataLoader(
        dataset,
        batch_sampler=[keys[i : i + batch_size] for i in range(0, len(keys), batch_size)],
        num_workers=min(workers, -(-len(keys) // batch_size)),
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
    )
    was_training = model.training
    model.eval()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    errors: dict[int, str] = {}
    done = 0
    for batch in batches(loader):
        clips = eval_transform(batch.clips, preprocessing=preprocessing, device=device)
        with autocast():
            logits = model(clips)
        read = batch.weights > 0
        errors |= dict(batch.errors)
        rows.append((batch.indices[read], logits.float().cpu()[read], batch.labels[read]))
        done += len(batch.labels)
        if progress is not None:
            progress(done, len(keys))
    model.train(was_training)
    return _join(rows, errors, classes=len(labels))


def batches(loader: DataLoader[ClipItem]) -> Iterator[ClipBatch]:
    """The batches of a loader. Raises RunError when a process that decodes videos dies."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"A process that decodes videos died: {error}. If memory ran out, take fewer --num-workers. "
            "A training goes on from its last checkpoint with --resume-from-checkpoint latest."
        ) from error


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of all processes as one, in the order of the videos."""
    errors = {index: reason for part in parts for index, reason in part.errors.items()}
    return _join([(p.indices, p.logits, p.labels) for p in parts], errors, classes=parts[0].logits.shape[1])


def _join(rows: Sequence[tuple[Tensor, Tensor, Tensor]], errors: dict[int, str], *, classes: int) -> Scores:
    if not rows:
        empty = torch.zeros(0, dtype=torch.long)
        return Scores(empty, torch.zeros(0, classes), empty, errors)
    indices, logits, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    order = indices.argsort()
    return Scores(indices[order], logits[order], labels[order], errors)
