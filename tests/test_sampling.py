"""Frame sampling."""

import math

import pytest

from tvit_cli.portable.reading import segment_indices


def test_centres_of_segments_are_taken_without_offsets():
    assert segment_indices(8, 4) == [1, 3, 5, 7]
    assert segment_indices(90, 3) == [15, 45, 75]


def test_a_video_as_long_as_the_clip_gives_every_frame_once():
    assert segment_indices(8, 8) == list(range(8))
    assert segment_indices(8, 8, [0.999] * 8) == list(range(8))


def test_short_video_repeats_its_last_frame():
    assert segment_indices(3, 5) == [0, 1, 2, 2, 2]
    assert segment_indices(1, 4, [0.9, 0.1, 0.5, 0.0]) == [0, 0, 0, 0]


@pytest.mark.parametrize("frame_count", [9, 17, 64, 301])
def test_each_frame_stays_in_its_segment_and_in_time_order(frame_count):
    n_frames = 8
    for at in (0.0, 0.25, 0.5, math.nextafter(1.0, 0.0)):
        indices = segment_indices(frame_count, n_frames, [at] * n_frames)
        assert indices == sorted(indices)
        for segment, index in enumerate(indices):
            start, end = segment * frame_count / n_frames, (segment + 1) * frame_count / n_frames
            assert math.floor(start) <= index < math.ceil(end)


def test_offsets_reach_the_first_and_the_last_frame():
    assert segment_indices(100, 4, [0.0] * 4)[0] == 0
    assert segment_indices(100, 4, [math.nextafter(1.0, 0.0)] * 4)[-1] == 99


@pytest.mark.parametrize(
    ("frame_count", "n_frames", "offsets"),
    [(0, 8, None), (8, 0, None), (8, 2, [0.5]), (8, 2, [0.5, 1.0]), (8, 2, [-0.1, 0.5])],
)
def test_what_has_no_answer_is_refused(frame_count, n_frames, offsets):
    with pytest.raises(ValueError, match=r"frames cannot be chosen|offsets in"):
        segment_indices(frame_count, n_frames, offsets)
