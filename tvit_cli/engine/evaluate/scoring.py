"""Scoring of videos: logits of deterministic views.

Letters: V videos, B clips, T frames, C channels, H W pixels, S the side of a frame, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.clips import ClipDataset, load_batches, worker_errors
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video, printable
from tvit_cli.engine.evaluate.metrics import ranks
from tvit_cli.engine.launch import ProcessGroup
from tvit_cli.engine.trained import Trained
from tvit_cli.files import FrameArray, Source
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

    `indices` (V,) are the rows' videos, ascending; `errors` maps the index of an unreadable video to the reason,
    `notes` that of a readable one to a word on its orientation.
    `view_ranks` (V, views) is the rank of the label in each view. Logits of several views are the logarithm of
    their mean probabilities.
    """

    indices: Tensor
    logits: Tensor
    labels: Tensor
    view_ranks: Tensor
    errors: dict[int, str]
    notes: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredClips:
    """Clips to score, and how the model receives them."""

    dataset: ClipDataset
    preprocessing: Preprocessing
    views: Views = ONE_VIEW

    def clip(self, name: str) -> Tensor | None:
        """The middle view of a video, normalised (T, C, S, S) float32; None where it cannot be read."""
        item = self.dataset[(0, [video.name for video in self.dataset.videos].index(name))]
        if item.error:
            return None
        clips = item.frames.chunk(self.views.clips_per_video)
        positions = [position for position, mirrored in self.views.crops if not mirrored]
        middle, at = clips[len(clips) // 2], positions[len(positions) // 2]
        pre, cpu = self.preprocessing, torch.device("cpu")
        return eval_transform([middle], preprocessing=pre, device=cpu, position=at)[0]


def clips_to_score(
    videos: Sequence[Video],
    labels: Sequence[str],
    preprocessing: Preprocessing,
    *,
    views: Views = ONE_VIEW,
    shuffle_seed: int | None = None,
    store: FrameStore | None = None,
) -> ScoredClips:
    """The clips of videos, read from a frame store if given; several clips of a video are one item."""
    dataset = ClipDataset(
        videos,
        labels,
        n_frames=preprocessing.n_frames,
        short_side=preprocessing.scale_to,
        seed=shuffle_seed or 0,
        training=False,
        shuffle_frames=shuffle_seed is not None,
        store=store,
        grid=preprocessing.frame_grid,
        clip_seconds=preprocessing.clip_seconds,
        clips_per_video=views.clips_per_video,
    )
    return ScoredClips(dataset, preprocessing, views)


def score(
    model: nn.Module,
    clips: ScoredClips,
    group: ProcessGroup,
    *,
    batch_size: int,
    workers: int,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores all clips; ranks take turns by batch, and each gets all scores.

    The batches, and so the logits, are the same for any number of processes: the last bits of a row depend on
    the rows computed together with it.
    """
    indices = range(len(clips.dataset))
    own = [indices[i : i + batch_size] for i in indices[::batch_size]][group.rank :: group.processes]
    total, done = sum(map(len, own)), 0
    parts: list[Scores] = []
    for part in score_batches(model, clips, own, group.device, workers=workers, autocast=autocast):
        parts.append(part)
        done += len(part.indices) + len(part.errors)
        if progress is not None:
            progress(done, total)
    none = torch.zeros(0, dtype=torch.long)  # a rank without a batch does not know the width of the output
    parts = parts or [Scores(none, torch.zeros(0, len(clips.dataset.labels)), none, torch.zeros(0), {})]
    return merge_scores(group.gather(merge_scores(parts)))


def score_batches(
    model: nn.Module,
    clips: ScoredClips,
    batches: Sequence[Sequence[int]],
    device: torch.device,
    *,
    workers: int,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Generator[Scores, None, None]:
    """The scores of each batch, given as indices of videos, as soon as it is done."""
    pre, pin_memory = clips.preprocessing, device.type == "cuda"
    keys = [[(0, index) for index in batch] for batch in batches]
    workers = min(workers, len(keys))
    loaded = load_batches(clips.dataset, keys, workers=workers, pin_memory=pin_memory, survives=True)
    was_training = model.training
    model.eval()
    try:
        with worker_errors(), closing(loaded):
            for batch in loaded:
                outputs = []
                with torch.inference_mode():
                    for views in zip(
                        *(c.chunk(clips.views.clips_per_video) for c in batch.clips), strict=True
                    ):
                        for at, flip in clips.views.crops:
                            frames = eval_transform(
                                views, preprocessing=pre, device=device, position=at, flip=flip
                            )
                            with autocast():
                                outputs.append(model(frames))
                    logits = torch.stack([output.float() for output in outputs]).cpu()  # (views, B, K)
                    mean = logits[0] if len(logits) == 1 else logits.double().softmax(2).mean(0).log().float()
                view_ranks = ranks(logits, batch.labels.expand(len(logits), -1)).T  # (B, views)
                read = batch.weights > 0
                rows = batch.indices[read], mean[read], batch.labels[read], view_ranks[read]
                yield Scores(*rows, dict(batch.errors), dict(batch.notes))
    finally:
        model.train(was_training)


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches or ranks as one, sorted by video."""
    errors = {index: reason for part in parts for index, reason in part.errors.items()}
    notes = {index: note for part in parts for index, note in part.notes.items()}
    rows = [part for part in parts if len(part.indices)] or parts[:1]
    names = ("indices", "logits", "labels", "view_ranks")
    columns = {name: torch.cat([getattr(part, name) for part in rows]) for name in names}
    order = columns["indices"].argsort()
    return Scores(**{name: column[order] for name, column in columns.items()}, errors=errors, notes=notes)


def unlabelled_video(source: Source, trained: Trained) -> Video:
    """A file, URL or array as a video to score, with an arbitrary label of the model."""
    url, array = source if isinstance(source, str) else "", source if isinstance(source, FrameArray) else None
    name, label = printable(str(source)), trained.card.labels[0]
    return Video(Path(str(source)), name, label, subset="test", group=None, url=url, array=array)


def score_locations(
    trained: Trained, locations: Sequence[Source], *, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """Scores files, URLs and arrays one by one. Raises ModelError if the weights overflow."""
    batches = [[index] for index in range(len(locations))]
    parts: list[Scores] = []
    for part in score_location_batches(trained, locations, batches):
        parts.append(part)
        if progress is not None:
            progress(len(parts), len(locations))
    return merge_scores(parts)


def score_location_batches(
    trained: Trained,
    locations: Sequence[Source],
    batches: Sequence[Sequence[int]],
    *,
    features: bool = False,
    workers: int = 0,
    time_limit: float | None = None,
) -> Generator[Scores, None, None]:
    """The scores of each batch as soon as it is done; `batches` are indices of files, URLs and arrays.

    With `features`, each row of logits is (K + D,), see `WithFeatures`. A video that takes `time_limit` seconds to
    decode is unreadable. Raises ModelError if the weights overflow.
    """
    videos = [unlabelled_video(location, trained) for location in locations]
    model = WithFeatures(trained.model) if features else trained.model
    clips = clips_to_score(videos, trained.card.labels, trained.card.preprocessing)
    clips.dataset.time_limit = time_limit
    made = score_batches(
        model, clips, batches, trained.device, workers=workers, autocast=trained.autocast
    )  # fmt: skip
    with closing(made):
        for scores in made:
            trained.check_scores(scores.logits)
            yield scores


class WithFeatures(nn.Module):
    """A model's logits followed by the features before the classifier: (B, T, C, H, W) -> (B, K + D)."""

    def __init__(self, model: TemporalViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        features = self.model.features(clips)  # (B, D)
        return torch.cat([self.model.classify(features), features], dim=1)
