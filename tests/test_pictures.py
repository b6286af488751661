"""Decoded frames as YUV planes for JPEG, and as RGB."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from videos import set_matrix, set_rotation, write_solid_colour

from tvit_cli.data.framestore_format import CRC, FRAME, Parameters
from tvit_cli.data.framestore_writer import pack_video
from tvit_cli.data.video import read_clip, read_frames
from tvit_cli.data.video_writer import write_video

Make = Callable[..., Path]

HALF = 1.5  # levels of 255: what rounding to whole numbers in three places may come to


def read_planes(path, short_side=None):
    return read_frames(
        path, range, lambda kept, chosen: list(kept.planes(chosen)), short_side=short_side
    ).frames


def to_rgb(planes):
    """JFIF's own formula (ITU-T T.871), chroma repeated."""
    height, width = planes.y.shape
    y, u, v = (plane.astype(float) for plane in planes)
    u, v = (c.repeat(2, 0).repeat(2, 1)[:height, :width] - 128 for c in (u, v))
    return np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1).clip(0, 255)


def stored_frames(path, short_side=256):
    """The frames of a frame store's record, decoded."""
    packed = pack_video(path, Parameters(frames_per_video=4, quality=95, short_side=short_side))
    rows = np.frombuffer(packed.record, FRAME, int(packed.row["stored"]))
    place, pictures = rows.nbytes + CRC.size, []
    for size in rows["bytes"]:
        pictures.append(simplejpeg.decode_jpeg(packed.record[place : place + size], colorspace="RGB"))
        place += int(size)
    return np.stack(pictures)


def ramp(height, width):
    """Two frames of soft colours that differ from side to side."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([90 + 40 * x / width, 160 - 40 * y / height, 90 + 40 * y / height], -1)
    return np.stack([frame, frame[::-1]]).astype(np.uint8)


@pytest.mark.parametrize(
    ("space", "full", "height", "matrix"),
    [
        (2, False, 48, "601"),
        (2, False, 720, "709"),
        (1, False, 48, "709"),
        (6, False, 720, "601"),
        (5, True, 48, "601"),
        (1, True, 48, "709"),
    ],
    ids=["unsaid and small", "unsaid and large", "tagged 709", "tagged 601", "full 601", "full 709"],
)
@pytest.mark.parametrize("form", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("short_side", [None, 24])
@pytest.mark.parametrize("rgb", [(200, 60, 30), (40, 90, 180), (235, 235, 235), (0, 0, 0), (255, 255, 255)])
def test_planes_have_the_colours_of_the_source(space, full, height, matrix, form, short_side, rgb, tmp_path):
    kr, kb = {"601": (0.299, 0.114), "709": (0.2126, 0.0722)}[matrix]
    red, green, blue = np.array(rgb) / 255
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    scale_y, low, scale_c = (255, 0, 255) if full else (219, 16, 224)
    yuv = (round(low + scale_y * luma), round(128 + scale_c * chroma[0]), round(128 + scale_c * chroma[1]))
    path = write_solid_colour(tmp_path / "video.mkv", yuv, height=height, space=space, full=full, form=form)
    colour = to_rgb(read_planes(path, short_side)[0]).mean(axis=(0, 1))
    assert np.abs(colour - rgb).mean() <= HALF


@pytest.mark.parametrize(
    "pixel_format", ["gray", "gray10le", "yuv420p10le", "yuv444p", "bgra", "yuva420p", "rgb48le", "bgr0"]
)
def test_any_pixel_format_becomes_planes(pixel_format, tmp_path, make_video, read_numbers):
    path = make_video(tmp_path / "video.mkv", frames=5, codec="ffv1", pixel_format=pixel_format)
    pictures = read_planes(path)
    assert {(p.y.shape, p.u.shape, p.v.shape) for p in pictures} == {((48, 64), (24, 32), (24, 32))}
    assert read_numbers(np.stack([to_rgb(p) for p in pictures])) == list(range(5))
    assert all(abs(float(c.mean()) - 128) <= 1 for p in pictures for c in (p.u, p.v))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 64), (48, 63), (47, 63), (16, 17)])
@pytest.mark.parametrize("short_side", [256, 15])
def test_frames_of_every_size_are_stored_to_their_last_row_and_column(height, width, short_side, tmp_path):
    path = tmp_path / "video.mkv"
    write_video(path, ramp(height, width), codec="ffv1", pixel_format="yuv444p")
    expected = read_clip(path, range, short_side=short_side).frames.astype(int)
    stored = stored_frames(path, short_side)
    assert stored.shape == expected.shape
    far = np.abs(stored - expected)
    assert far.mean() < 2
    assert max(far[:, -1].mean(), far[:, :, -1].mean()) < 3
    assert np.array_equal(stored, stored_frames(path, short_side))


@pytest.mark.parametrize("degrees", [90, 270])
@pytest.mark.parametrize("short_side", [256, 31])
def test_a_turned_video_is_stored_upright(degrees, short_side, tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, ramp(48, 64))
    set_rotation(path, degrees)
    expected = read_clip(path, range, short_side=short_side).frames.astype(int)
    stored = stored_frames(path, short_side)
    assert stored.shape == expected.shape
    assert stored.shape[1] > stored.shape[2]
    assert np.abs(stored - expected).mean() < 2


def test_a_mirrored_video_is_stored_as_it_is_shown(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, ramp(48, 64))
    set_matrix(path, -1, 0, 0, 1)
    assert np.abs(stored_frames(path) - ramp(48, 64)[:, :, ::-1].astype(int)).mean() < 3


def test_planes_of_frames_scaled_down_a_lot_are_those_of_the_picture(tmp_path):
    path = tmp_path / "video.mkv"
    write_video(path, ramp(256, 320), codec="ffv1")
    expected = read_clip(path, range, short_side=16).frames
    pictures = np.stack([to_rgb(planes) for planes in read_planes(path, 16)])
    assert pictures.shape == expected.shape == (2, 16, 20, 3)
    assert np.abs(pictures - expected).mean() < 2
