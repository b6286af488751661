"""Videos with their labels written into the picture."""

from itertools import pairwise

import numpy as np
import pytest

from tvit_cli.data.video import iter_frames, probe
from tvit_cli.data.video_writer import video_writer, write_video
from tvit_cli.engine.predict.timeline import WHOLE, annotate
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.report.film import caption_mask, draw_caption
from tvit_cli.results import Progress, Segment


def test_every_frame_keeps_its_time_and_has_the_caption_of_its_segment(tmp_path, make_video):
    source = make_video(tmp_path / "a.mp4", frames=20, height=91, width=121, rate=10, pixel_format="yuv420p")
    out = tmp_path / "new" / "out.mp4"
    events = []
    segments = [Segment(0, 0.7, "A", 0.9), Segment(0.7, 2, "a much longer label", 0.8)]
    annotate(out, source, segments, events.append)
    before, after = list(iter_frames(source)), list(iter_frames(out))
    assert [p.start for p in after] == pytest.approx([p.start for p in before], abs=1e-3)
    assert (probe(out).width, probe(out).height) == (120, 90)
    assert events == [Progress("seconds written", second, 2) for second in (1, 2)]
    assert [p.end for p in after] == pytest.approx([p.end for p in before], abs=1e-3)
    assert after[0].length == pytest.approx(2.0, abs=1e-3)  # the last frame lasts as long as the others
    widths = []
    for a, b in zip(before, after, strict=True):
        change = np.abs(a.picture()[:90, :120].astype(int) - b.picture()).max(2) > 25
        assert not change[:60].any()  # the picture itself stays
        widths.append(int(np.flatnonzero(change.any(0)).max()))
    assert max(widths[:7]) < 60 < min(widths[7:])
    assert [path.name for path in out.parent.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_nearer_than_a_tick_of_the_output_are_all_written(tmp_path, suffix):
    ticks = [0, 1, 2, 3, 4, 3600, 3601, 7200, 10800]  # of 1/90,000 s, as MPEG-TS counts
    with video_writer(tmp_path / f"out{suffix}") as writer:
        for number, (start, end) in enumerate(pairwise([*ticks, 14400])):
            picture = np.full((48, 64, 3), 20 + 20 * number, np.uint8)
            writer.write(picture, start / 90_000, end / 90_000)
    found = list(iter_frames(tmp_path / f"out{suffix}"))
    assert [p.start for p in found] == pytest.approx([tick / 90_000 for tick in ticks], abs=1e-3)
    levels = [int(p.picture().mean()) for p in found]
    assert levels == pytest.approx([20 + 20 * number for number in range(len(ticks))], abs=6)


@pytest.mark.parametrize("height", [240, 720])
def test_colours_stay_as_they_are(tmp_path, height):
    colour = np.broadcast_to(np.array([200, 30, 30], np.uint8), (height, height, 3))
    with video_writer(tmp_path / "one.mp4") as writer:
        writer.write(colour, 0.0, 0.1)
        writer.write(colour, 0.1, 0.5)
    write_video(tmp_path / "all.mp4", np.stack([colour, colour]))
    for name in ("one.mp4", "all.mp4"):
        for frame in iter_frames(tmp_path / name):
            assert np.abs(frame.picture().astype(int) - colour).max() <= 3, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (31, 1)])
def test_a_video_of_one_pixel_is_annotated(height, width, tmp_path):
    source, out = tmp_path / "a.avi", tmp_path / "out.mp4"
    frames = np.full((4, height, width, 3), 90, np.uint8)
    write_video(source, frames, codec="png", pixel_format="rgb24")
    annotate(out, source, [Segment(0.0, WHOLE, "A", 0.9)])
    info = probe(out)
    assert (info.frames, info.height, info.width) == (4, max(height // 2 * 2, 2), max(width // 2 * 2, 2))


def test_a_caption_is_light_on_a_darkened_corner_and_fits_the_picture():
    picture = np.full((180, 240, 3), 100, np.uint8)
    out = draw_caption(picture, "Walk  0.93")
    rows, columns = caption_mask("Walk  0.93", 180, 240).shape
    assert (out[: 180 - rows] == 100).all() and (out[:, columns:] == 100).all()
    corner = out[180 - rows :, :columns]
    assert corner.max() > 230 and corner.min() == 35 and (picture == 100).all()
    assert caption_mask("a very long label indeed, " * 5, 48, 64).shape[1] <= 64


def test_a_video_does_not_replace_itself_and_a_failure_leaves_nothing(tmp_path, make_video):
    source = make_video(tmp_path / "a.mp4", frames=3)
    whole = [Segment(0, WHOLE, "A", 1.0)]
    with pytest.raises(DataError, match="is the video itself"):
        annotate(source, source, whole)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="not a video"):
        annotate(tmp_path / "out.mp4", tmp_path / "text.mp4", whole)
    with pytest.raises(RunError, match="could not be written"), video_writer(source / "below.mp4"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "text.mp4"]
