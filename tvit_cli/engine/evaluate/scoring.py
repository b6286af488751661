"""Scoring of videos: logits of deterministic views.

Letters: V videos, B clips, T frames, C channels, H W pixels, S the side of a frame, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.clips import ClipDataset, load_batches, worker_errors
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video, printable
from tvit_cli.engine.evaluate.metrics import ranks
from tvit_cli.engine.trained import Trained
from tvit_cli.files import Location
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.settings.card import Preprocessing


@dataclass(frozen=True)
class Views:
    """Views of each video: clips in time, crops along the long side, and mirrored crops."""

    clips_per_video: int = 1
    crops_per_clip: int = 1
    flip: bool = False

    @property
    def crops(self) -> tuple[tuple[float, bool], ...]:
        """Views of one clip: (position along the long side in [0, 1], mirrored)."""
        last = self.crops_per_clip - 1
        positions = [crop / last for crop in range(last + 1)] if last else [0.5]
        return tuple((at, mirrored) for at in positions for mirrored in (False, True)[: 1 + self.flip])

    def __len__(self) -> int:
        return self.clips_per_video * len(self.crops)


ONE_VIEW = Views()


@dataclass(frozen=True)
class Scores:
    """Logits (V, K) float32 and labels (V,) of the readable videos, and the errors of the others.

    `indices` (V,) are the rows' videos, ascending; `errors` maps the index of an unreadable video to the reason.
    `view_ranks` (V, views) is the rank of the label in each view. Logits of several views are the logarithm of
    their mean probabilities.
    """

    indices: Tensor
    logits: Tensor
    labels: Tensor
    view_ranks: Tensor
    errors: dict[int, str]


@worker_errors()
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
    """Scores this rank's share of the videos: every `processes`-th batch, from `rank` on.

    The batches, and so the logits, are the same for any number of processes: the last bits of a row depend on
    the rows computed together with it.
    """
    dataset = clips_to_score(
        videos, labels, preprocessing, views=views, shuffle_seed=shuffle_seed, store=store
    )
    keys = [(0, index) for index in range(len(videos))]
    own = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)][rank::processes]
    total, done = sum(map(len, own)), 0
    loaded = load_batches(dataset, own, workers=min(workers, len(own)), pin_memory=device.type == "cuda")
    was_training = model.training
    model.eval()
    parts: list[Scores] = []
    with closing(loaded):
        for batch in loaded:
            outputs = []
            for clips in zip(*(clip.chunk(views.clips_per_video) for clip in batch.clips), strict=True):
                for position, flip in views.crops:
                    frames = eval_transform(
                        list(clips), preprocessing=preprocessing, device=device, position=position, flip=flip
                    )
                    with autocast():
                        outputs.append(model(frames))
            logits = torch.stack([output.float() for output in outputs]).cpu()  # (views, B, K)
            mean = logits[0] if len(logits) == 1 else logits.double().softmax(2).mean(0).log().float()
            view_ranks = ranks(logits, batch.labels.expand(len(logits), -1)).T  # (B, views)
            read = batch.weights > 0
            rows = batch.indices[read], mean[read], batch.labels[read], view_ranks[read]
            parts.append(Scores(*rows, dict(batch.errors)))
            done += len(batch.labels)
            if progress is not None:
                progress(done, total)
    model.train(was_training)
    if parts:
        return merge_scores(parts)
    empty = torch.zeros(0, dtype=torch.long)
    return Scores(empty, torch.zeros(0, len(labels)), empty, torch.zeros(0), {})


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches or ranks as one, sorted by video."""
    errors = {index: reason for part in parts for index, reason in part.errors.items()}
    # Without a batch, a rank does not know the width of the model's output.
    rows = [part for part in parts if len(part.indices)] or parts[:1]
    indices = torch.cat([part.indices for part in rows])
    order = indices.argsort()
    return Scores(
        indices[order],
        torch.cat([part.logits for part in rows])[order],
        torch.cat([part.labels for part in rows])[order],
        torch.cat([part.view_ranks for part in rows])[order],
        errors,
    )


def clips_to_score(
    videos: Sequence[Video],
    labels: Sequence[str],
    preprocessing: Preprocessing,
    *,
    views: Views = ONE_VIEW,
    shuffle_seed: int | None = None,
    store: FrameStore | None = None,
) -> ClipDataset:
    """The data set of the clips to score; several clips of a video are one item."""
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


def unlabelled_video(location: Location, trained: Trained) -> Video:
    """A file or URL as a video to score, with an arbitrary label of the model."""
    path, url = (Path(location), location) if isinstance(location, str) else (location, "")
    label = trained.card.labels[0]
    return Video(path=path, name=printable(str(location)), label=label, subset="test", group=None, url=url)


def score_locations(
    trained: Trained,
    locations: Sequence[Location],
    *,
    features: bool = False,
    batch_size: int = 1,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores files and URLs; with `features`, each row of logits is (K + D,), see `WithFeatures`."""
    return score(
        WithFeatures(trained.model) if features else trained.model,
        [unlabelled_video(location, trained) for location in locations],
        trained.card.labels,
        trained.card.preprocessing,
        device=trained.device,
        batch_size=batch_size,
        workers=workers,
        autocast=trained.autocast,
        progress=progress,
    )


class WithFeatures(nn.Module):
    """A model's logits followed by the features before the classifier: (B, T, C, H, W) -> (B, K + D)."""

    def __init__(self, model: TemporalViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        features = self.model.features(clips)  # (B, D)
        return torch.cat([self.model.classify(features), features], dim=1)


@dataclass(frozen=True)
class ScoredClips:
    """The clips of an evaluation, as the model received them."""

    clips: ClipDataset
    preprocessing: Preprocessing
    views: Views

    def clip(self, name: str) -> Tensor | None:
        """The middle view of a video, normalised (T, C, S, S) float32; None where it cannot be read."""
        item = self.clips[(0, [video.name for video in self.clips.videos].index(name))]
        if item.error:
            return None
        frames = item.frames.chunk(self.views.clips_per_video)[self.views.clips_per_video // 2]
        positions = [position for position, mirrored in self.views.crops if not mirrored]
        return eval_transform(
            [frames],
            preprocessing=self.preprocessing,
            device=torch.device("cpu"),
            position=positions[len(positions) // 2],
            flip=False,
        )[0]
