"""A torch Dataset of clips: uint8 frames out of the workers, unreadable videos set aside.

Letters: B clips, T frames, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tvit_cli.data.container import Place
from tvit_cli.data.draws import Kind, draw_generator
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video
from tvit_cli.data.sampling import Key, clip_places, indices_on_grid, segment_indices
from tvit_cli.data.video import Clip, read_clip
from tvit_cli.errors import VideoError


@dataclass(frozen=True, slots=True)
class ClipItem:
    """One clip on its way to a batch; `weight` is 0 and `error` says why where the video cannot be read."""

    frames: Tensor  # uint8 (T, C, H, W), channels last in memory; of several clips, one after the other
    label: int
    epoch: int
    index: int
    weight: float
    error: str


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """Clips of one batch, each in the size that its video has."""

    clips: list[Tensor]  # B times uint8 (T, C, H, W)
    labels: Tensor  # int64 (B,)
    epochs: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,)
    weights: Tensor  # float32 (B,); 0 for a video that could not be read
    errors: list[tuple[int, str]]  # (index, reason) of those

    def pin_memory(self) -> ClipBatch:
        """The same batch in page-locked memory; torch's DataLoader calls this by name."""
        return ClipBatch(
            [clip.pin_memory() for clip in self.clips],
            self.labels.pin_memory(),
            self.epochs.pin_memory(),
            self.indices.pin_memory(),
            self.weights.pin_memory(),
            self.errors,
        )


class ClipDataset(Dataset[ClipItem]):
    """One clip per video under the key (epoch, index).

    In training, the frames are drawn within their segments from (seed, epoch, index) and nothing else, so a
    resumed run and any number of workers see the same clips. Otherwise `clips_per_video` clips are taken at
    even places within the segments (one: their centres) and handed over as one, one after the other.
    `shuffle_frames` destroys the order of time, the same way in every epoch: a diagnostic. A video that
    cannot be read becomes black frames of weight 0, so that every process keeps the same number of steps.

    Frames come from `store` where there is one, else from the videos. `grid` restricts both to the frames
    that a store of so many frames per video holds, so that both choose the very same; without it, the store
    gives the stored frames nearest to those that the video would give.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        labels: Sequence[str],
        *,
        n_frames: int,
        short_side: int,
        seed: int,
        training: bool,
        shuffle_frames: bool = False,
        threads: int = 1,
        store: FrameStore | None = None,
        grid: int | None = None,
        clips_per_video: int = 1,
    ) -> None:
        assert clips_per_video == 1 or not training
        position = {label: number for number, label in enumerate(labels)}
        self._paths: list[Place] = [video.url or video.path for video in videos]
        self.names = [video.name for video in videos]
        self._targets = [position[video.label] for video in videos]
        self._n_frames = n_frames
        self._short_side = short_side
        self._seed = seed
        self._training = training
        self._shuffle_frames = shuffle_frames
        self._threads = threads
        self.store = store
        self._grid = grid
        self._clips_per_video = clips_per_video
        self._frame_counts: dict[int, int] = {}  # exact, once a video was read; each worker learns its own

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: Key) -> ClipItem:
        epoch, index = key
        try:
            clip = self._read(epoch, index)
        except VideoError as error:
            n_frames = self._n_frames * self._clips_per_video
            black = torch.zeros(n_frames, self._short_side, self._short_side, 3, dtype=torch.uint8)
            reason = str(error).removeprefix(f"{self._paths[index]}: ")
            return ClipItem(black.permute(0, 3, 1, 2), self._targets[index], epoch, index, 0.0, reason)
        self._frame_counts[index] = clip.frame_count
        frames = torch.from_numpy(clip.frames)  # (T * clips, H, W, C): by segment, then by clip
        if self._clips_per_video > 1:
            frames = frames.view(-1, self._clips_per_video, *frames.shape[1:]).transpose(0, 1).flatten(0, 1)
        if self._shuffle_frames:
            order = draw_generator(self._seed, Kind.ORDER, index).permutation(self._n_frames)
            frames = frames.view(-1, self._n_frames, *frames.shape[1:])[:, torch.from_numpy(order)].flatten(
                0, 1
            )
        frames = frames.permute(0, 3, 1, 2)  # (clips * T, C, H, W)
        return ClipItem(frames, self._targets[index], epoch, index, 1.0, "")

    def _read(self, epoch: int, index: int) -> Clip:
        if self._training:
            takes = [draw_generator(self._seed, Kind.OFFSETS, epoch, index).random(self._n_frames).tolist()]
        else:
            takes = [[place] * self._n_frames for place in clip_places(self._clips_per_video)]

        def choose(frame_count: int) -> list[int]:
            clips = [
                segment_indices(frame_count, self._n_frames, offsets)
                if self._grid is None
                else indices_on_grid(frame_count, self._n_frames, offsets, grid=self._grid)
                for offsets in takes
            ]
            return [index for segment in zip(*clips, strict=True) for index in segment]  # ascending

        if self.store is not None:
            return self.store.read(self.names[index], choose, short_side=self._short_side)
        return read_clip(
            self._paths[index],
            choose,
            short_side=self._short_side,
            frame_count=self._frame_counts.get(index),
            threads=self._threads,
        )


def collate(items: Sequence[ClipItem]) -> ClipBatch:
    """Batches clips without stacking them: videos differ in size until they are transformed."""
    return ClipBatch(
        clips=[item.frames for item in items],
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        epochs=torch.tensor([item.epoch for item in items], dtype=torch.int64),
        indices=torch.tensor([item.index for item in items], dtype=torch.int64),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        errors=[(item.index, item.error) for item in items if item.error],
    )
