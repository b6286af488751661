"""Preprocessing of a tvit model for transformers: a video file or its frames -> `pixel_values`, by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BatchFeature
from transformers.video_processing_utils import VideoProcessorMixin

from .preprocessing import frames_to_input
from .reading import ASSUMED_RATE, Times, dense_indices, read_clip, segment_indices


class TvitVideoProcessor(VideoProcessorMixin):
    """Samples, resizes, crops and normalises frames with the values of the model's training.

    `n_frames` frames, the middle ones of equal segments of the video (with `frame_grid`, of that many evenly spaced
    frames), or evenly from the middle `clip_seconds`, are resized to `scale_to` (`resize` crop: short side; squash:
    whole frame), cropped to `frame_size` pixels at the centre, and normalised by `image_mean` and `image_std`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (as transformers declares it)

    def __init__(
        self,
        n_frames: int = 8,
        frame_size: int = 224,
        resize: str = "crop",
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        frame_grid: int | None = None,
        scale_to: int | None = None,
        clip_seconds: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_frames = n_frames
        self.frame_size = frame_size
        self.resize = resize
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.frame_grid = frame_grid
        self.clip_seconds = clip_seconds
        self.scale_to = frame_size if scale_to is None else scale_to

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """One video or a list of them -> `pixel_values`, float32 (B, T, C, S, S).

        A video is a path, or all its frames: uint8 (frames, H, W, C), or a list of pictures, of which `fps` (25 by
        default) were shown per second where the model takes `clip_seconds`; n_frames of them are the clip. Options
        of other processors (`num_frames`, `do_sample_frames`, `return_tensors`) are accepted and ignored. Raises
        ValueError for frames of another type or shape.
        """
        is_one = isinstance(videos, str | PathLike) or getattr(videos, "ndim", 5) == 4
        videos = [videos] if is_one else list(videos)
        if not isinstance(videos[0], str | PathLike) and np.ndim(videos[0]) in (2, 3):
            videos = [videos]  # the pictures of one video
        return BatchFeature(
            {"pixel_values": torch.stack([self._clip(video, kwargs.get("fps")) for video in videos])}
        )

    def _clip(self, video: Any, fps: float | None) -> Tensor:
        if isinstance(video, str | PathLike):
            frames = read_clip(
                video,
                n_frames=self.n_frames,
                short_side=self.scale_to,
                frame_grid=self.frame_grid,
                clip_seconds=self.clip_seconds,
            )
        else:
            stacked = np.stack([np.asarray(frame) for frame in video])
            if stacked.dtype != np.uint8 or stacked.ndim != 4 or stacked.shape[3] != 3:
                actual = f"{stacked.dtype} {stacked.shape}"
                raise ValueError(f"frames must be uint8 (frames, H, W, 3), not {actual}")
            count, rate = len(stacked), fps or ASSUMED_RATE
            indices = segment_indices(count, self.n_frames, grid=self.frame_grid)
            if self.clip_seconds is not None and count != self.n_frames:  # else they are the clip
                times = Times([index / rate for index in range(count)], count / rate)
                indices = dense_indices(times, self.n_frames, self.clip_seconds)
            frames = stacked[indices]
        return frames_to_input(
            torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2),
            frame_size=self.frame_size,
            resize=self.resize,
            mean=self.image_mean,
            std=self.image_std,
            scale_to=self.scale_to,
        )
