"""Which frames of a video make a clip: index arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

# (epoch, index of the video): what a clip's frames and augmentation are drawn from. A clip that is read again in
# one epoch takes the number of an epoch after the run's last one, so that it is not the same again.
Key = tuple[int, int]

CENTRE = 0.5  # of a segment: where evaluation takes its frame


def segment_indices(frame_count: int, n_frames: int, offsets: Sequence[float] | None = None) -> list[int]:
    """Indices of `n_frames` frames in time order, one from each of as many equal segments of the time line.

    `offsets` are places within the segments, each in [0, 1); None means their centres. A video shorter than
    the clip gives all its frames and repeats its last. TSN's sampling (Wang et al. 2016).
    8 frames, 4 wanted -> segments 0-1, 2-3, 4-5, 6-7 -> centres [1, 3, 5, 7].
    3 frames, 5 wanted -> [0, 1, 2, 2, 2].
    """
    if frame_count < 1 or n_frames < 1:
        raise ValueError(f"{n_frames} frames cannot be chosen from {frame_count}")
    if offsets is None:
        offsets = [CENTRE] * n_frames
    if len(offsets) != n_frames or not all(0 <= offset < 1 for offset in offsets):
        raise ValueError(f"{n_frames} offsets in [0, 1) are needed, not {list(offsets)}")
    if frame_count < n_frames:
        return [min(index, frame_count - 1) for index in range(n_frames)]
    indices = []
    for segment, offset in enumerate(offsets):
        index = int((segment + offset) * frame_count / n_frames)
        last = -(-(segment + 1) * frame_count // n_frames) - 1  # of the segment; rounding may reach beyond
        indices.append(min(index, last))
    return indices


def clip_places(clips: int) -> list[float]:
    """Where within each segment the clips of one video take their frames. 1 -> [1/2]; 2 -> [1/4, 3/4]"""
    return [(clip + CENTRE) / clips for clip in range(clips)]


def grid_indices(frame_count: int, grid: int) -> list[int]:
    """The frames that a frame store keeps: the centres of `grid` segments, or all where there are fewer."""
    return segment_indices(frame_count, min(grid, frame_count))


def indices_on_grid(
    frame_count: int, n_frames: int, offsets: Sequence[float] | None = None, *, grid: int
) -> list[int]:
    """`segment_indices` of a video that had no other frames than those on its grid.

    16 frames, grid of 4 -> 2 6 10 14; 2 wanted, their centres -> [6, 14].
    """
    kept = grid_indices(frame_count, grid)
    return [kept[position] for position in segment_indices(len(kept), n_frames, offsets)]
