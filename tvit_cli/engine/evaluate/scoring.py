"""Scoring of videos: deterministic views in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.clips import ClipBatch, ClipDataset, explains_dead_workers, load_batches
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video
from tvit_cli.engine.evaluate.metrics import ranks
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.settings.card import Preprocessing


@dataclass(frozen=True)
class Views:
    """How often a video is looked at: clips in time, crops along the long side, mirrored as well."""

    clips_per_video: int = 1
    crops_per_clip: int = 1
    flip: bool = False

    @property
    def crops(self) -> tuple[tuple[float, bool], ...]:
        """The views of one clip: (place along the long side, mirrored)."""
        last = self.crops_per_clip - 1
        places = [crop / last for crop in range(last + 1)] if last else [0.5]
        return tuple((place, mirrored) for place in places for mirrored in (False, True)[: 1 + self.flip])

    def __len__(self) -> int:
        return self.clips_per_video * len(self.crops)


ONE_VIEW = Views()


@dataclass(frozen=True)
class Scores:
    """Logits (V, K) float32 and labels (V,) of the videos that could be read, and why the others could not.

    `indices` (V,) says which of the videos each row belongs to, ascending; `errors` maps the index of an
    unreadable video to the reason. `view_ranks` (V, views) is the place of the label among the classes in each
    view. Logits of several views are the logarithm of their mean score.
    """

    indices: Tensor
    logits: Tensor
    labels: Tensor
    view_ranks: Tensor
    errors: dict[int, str]


@explains_dead_workers()
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
    views: Views = ONE_VIEW,
    rank: int = 0,
    processes: int = 1,
    shuffle_seed: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    store: FrameStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score this process's share of the videos: every `processes`-th batch, from `rank` on.

    The batches are the same for any number of processes, and with them each logit: the last bits of a row depend on
    how many rows are computed together.
    """
    dataset = clips_to_score(
        videos, labels, preprocessing, views=views, shuffle_seed=shuffle_seed, store=store
    )
    keys = [(0, index) for index in range(len(videos))]
    own = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)][rank::processes]
    count = sum(map(len, own))
    loaded = load_batches(dataset, own, workers=min(workers, len(own)), pin_memory=device.type == "cuda")
    was_training = model.training
    model.eval()
    rows: list[_Rows] = []
    errors: dict[int, str] = {}
    done = 0
    with closing(loaded):
        for batch in loaded:
            logits = torch.stack(
                [
                    _logits(model, clips, preprocessing, device, place, flip, autocast)
                    for clips in _clips(batch, views)
                    for place, flip in views.crops
                ]
            ).cpu()  # (views, B, K)
            read = batch.weights > 0
            errors |= dict(batch.errors)
            of_views = ranks(logits, batch.labels.expand(len(logits), -1)).T  # (B, views)
            rows.append((batch.indices[read], _mean(logits)[read], batch.labels[read], of_views[read]))
            done += len(batch.labels)
            if progress is not None:
                progress(done, count)
    model.train(was_training)
    return _join(rows, errors, classes=len(labels))


def clips_to_score(
    videos: Sequence[Video],
    labels: Sequence[str],
    preprocessing: Preprocessing,
    *,
    views: Views = ONE_VIEW,
    shuffle_seed: int | None = None,
    store: FrameStore | None = None,
) -> ClipDataset:
    """The clips that a model is scored on; for several clips of a video, one item with all of them."""
    return ClipDataset(
        videos,
        labels,
        n_frames=preprocessing.n_frames,
        short_side=preprocessing.scale_to,
        seed=shuffle_seed or 0,
        training=False,
        shuffle_frames=shuffle_seed is not None,
        store=store,
        grid=preprocessing.frame_grid,
        clips_per_video=views.clips_per_video,
    )


class WithFeatures(nn.Module):
    """A model's logits and, behind them, the features that they are read from: (B, T, C, H, W) -> (B, K + D)."""

    def __init__(self, model: TemporalViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        features = self.model.features(clips)  # (B, D)
        return torch.cat([self.model.classify(features), features], dim=1)


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of all processes as one, in the order of the videos."""
    errors = {index: reason for part in parts for index, reason in part.errors.items()}
    # A process that had no batch does not know how wide a model's answers are.
    rows = [(p.indices, p.logits, p.labels, p.view_ranks) for p in parts if len(p.indices)]
    return _join(rows, errors, classes=parts[0].logits.shape[1])


_Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # indices, logits, labels, ranks in each view


def _clips(batch: ClipBatch, views: Views) -> Iterator[list[Tensor]]:
    """The first clip of each video, then the second of each …"""
    yield from (
        list(clips) for clips in zip(*(v.chunk(views.clips_per_video) for v in batch.clips), strict=True)
    )


def _logits(
    model: nn.Module,
    clips: list[Tensor],
    preprocessing: Preprocessing,
    device: torch.device,
    place: float,
    flip: bool,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    frames = eval_transform(clips, preprocessing=preprocessing, device=device, place=place, flip=flip)
    with autocast():
        logits: Tensor = model(frames)
    return logits.float()


def _mean(logits: Tensor) -> Tensor:
    """Logits of the mean score, (views, B, K) -> (B, K); of one view, its own."""
    return logits[0] if len(logits) == 1 else logits.double().softmax(2).mean(0).log().float()


def _join(rows: Sequence[_Rows], errors: dict[int, str], *, classes: int) -> Scores:
    if not rows:
        empty = torch.zeros(0, dtype=torch.long)
        return Scores(empty, torch.zeros(0, classes), empty, torch.zeros(0), errors)
    indices, logits, labels, of_views = (torch.cat(column) for column in zip(*rows, strict=True))
    order = indices.argsort()
    return Scores(indices[order], logits[order], labels[order], of_views[order], errors)


@dataclass(frozen=True)
class ScoredClips:
    """The clips of an evaluation, as the model was given them."""

    clips: ClipDataset
    preprocessing: Preprocessing
    views: Views

    def clip(self, name: str) -> Tensor | None:
        """The clip of a video by its name, normalised (T, C, S, S) float32; None where it cannot be read.

        Of several views of a video, the one in the middle.
        """
        item = self.clips[(0, self.clips.names.index(name))]
        if item.error:
            return None
        frames = item.frames.chunk(self.views.clips_per_video)[self.views.clips_per_video // 2]
        places = [place for place, mirrored in self.views.crops if not mirrored]
        place = places[len(places) // 2]
        return eval_transform(
            [frames], preprocessing=self.preprocessing, device=torch.device("cpu"), place=place, flip=False
        )[0]
