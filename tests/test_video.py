"""Probing, decoding and writing video files, damaged ones too."""

import contextlib
import csv
import importlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from loopback import serving
from PIL import Image, ImageOps, features
from videos import set_matrix, set_rotation

import tvit_cli
from tvit_cli.data import video
from tvit_cli.data.layout import VIDEO_SUFFIXES
from tvit_cli.data.video import count_frames, decode_first, iter_frames, probe, read_clip
from tvit_cli.data.video_writer import video_writer, write_video
from tvit_cli.engine.extract import check, extract, scan_video
from tvit_cli.engine.predict import load_model, predict, predict_timelines
from tvit_cli.engine.predict.timeline import annotate
from tvit_cli.errors import DataError, RunError, TvitError, VideoError
from tvit_cli.portable import reading
from tvit_cli.portable.reading import segment_indices
from tvit_cli.report.film import timeline_png
from tvit_cli.results import Note
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.predict import PredictSettings

Make = Callable[..., Path]
ReadNumbers = Callable[[np.ndarray], list[int]]
CODECS = [
    pytest.param(".avi", {"codec": "mpeg4"}, id="mpeg4"),
    pytest.param(".avi", {"codec": "mpeg4", "options": {"bf": "2"}}, id="mpeg4 with B-frames"),
    pytest.param(".mp4", {"codec": "libx264", "options": {"bf": "3", "crf": "20"}}, id="h264 in mp4"),
    pytest.param(".mkv", {"codec": "libx264", "options": {"bf": "3", "crf": "20"}}, id="h264 in mkv"),
    pytest.param(".ts", {"codec": "libx264", "options": {"bf": "2", "crf": "20"}}, id="h264 in ts"),
    pytest.param(".webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}, id="vp9"),
    pytest.param(
        ".mpg", {"codec": "mpeg2video", "options": {"bf": "2", "qmin": "2", "qmax": "2"}}, id="mpeg2"
    ),
    pytest.param(".avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}, id="mjpeg"),
    pytest.param(".mkv", {"codec": "ffv1"}, id="ffv1"),
    pytest.param(".gif", {"codec": "gif", "pixel_format": "gray"}, id="gif"),
]
CHOSEN = [30], [0, 13, 14, 39], [5, 5, 11, 36]


def decode_all(path):
    return read_clip(path, lambda n: range(n), known=None).frames


def x264(more):
    return {"codec": "libx264", "options": {"bf": "3", "crf": "20", "x264-params": more}}


ORDERED = [
    *(
        pytest.param(*case.values, count, id=case.id)
        for case, count in zip(CODECS, (110, 50, 30, 30, 30, 35), strict=False)
    ),
    pytest.param(".mp4", x264("open-gop=1"), 70, id="h264, open groups"),
    pytest.param(".mp4", x264("tff=1"), 45, id="h264, interlaced"),
    pytest.param(".mkv", {**x264("bframes=3"), "pixel_format": "yuv444p"}, 75, id="h264, 4:4:4"),
    pytest.param(".mp4", {"codec": "libx265", "options": {"x265-params": "log-level=0"}}, 45, id="hevc"),
]


@pytest.mark.parametrize(("suffix", "how", "most"), ORDERED)
def test_later_readings_decode_what_their_frames_need(suffix, how, most, make_video, tmp_path, monkeypatch):
    how = {**how, "options": {**how.get("options", {}), "g": "12"}}
    path = make_video(tmp_path / f"clip{suffix}", frames=40, **how)
    first = read_clip(path, range)
    whole = [read_clip(path, lambda n, c=c: c, known=40) for c in CHOSEN]
    decoded, decode = [], video._decode
    monkeypatch.setattr(
        video, "_decode", lambda *args: (decoded.append(frame) or frame for frame in decode(*args))
    )
    for chosen, same in zip(CHOSEN, whole, strict=True):
        later = read_clip(path, lambda n, c=chosen: c, known=first.order)
        assert later.order is first.order is not None
        assert later.frame_count == 40 and later.indices == tuple(chosen)
        assert np.array_equal(later.frames, first.frames[chosen]) and later.pts_seconds == same.pts_seconds
    assert most // 2 < len(decoded) <= most


def test_order_is_not_used_for_a_file_damaged_since(make_video, tmp_path):
    path = make_video(tmp_path / "clip.mp4", frames=40, **x264("keyint=250"))
    order = read_clip(path, range).order
    assert order is not None
    with av.open(path) as container:
        packet = next(islice(container.demux(video=0), 10, None))
    content, half = bytearray(path.read_bytes()), packet.size // 2
    content[packet.pos + half : packet.pos + packet.size] = b"\xa5" * (packet.size - half)
    path.write_bytes(content)
    again = read_clip(path, lambda n: [n - 1], known=order)
    assert again.order is None
    assert np.array_equal(again.frames, read_clip(path, lambda n: [n - 1]).frames)


def test_order_is_left_where_parameters_change_within_the_video(make_video, tmp_path):
    parts = [
        make_video(
            tmp_path / f"{preset}.h264", frames=24, codec="libx264", options={"preset": preset, "g": "12"}
        )
        for preset in ("medium", "ultrafast")
    ]
    path = tmp_path / "joined.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read_clip(parts[0], range).order is not None
    assert read_clip(path, range).order is None


def test_order_is_left_where_frames_and_packets_differ(make_video, tmp_path):
    path = make_video(tmp_path / "clip.avi", frames=40)
    order = read_clip(path, range).order
    assert order is not None
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 3 // 4)
    again = read_clip(path, lambda n: [n - 1], known=order)
    assert again.order is None
    assert np.array_equal(again.frames, read_clip(path, lambda n: [n - 1]).frames)


def write_packets(path, change):
    """Rewrites an MJPEG file with other packet contents."""
    changed = path.with_suffix(".changed.avi")
    with av.open(str(path)) as source, av.open(str(changed), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            copy = av.Packet(change(number, packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.stream = stream
            target.mux(copy)
    changed.replace(path)


@pytest.mark.parametrize(("suffix", "how"), CODECS)
def test_chosen_frames_are_exactly_those_of_decoding_all(suffix, how, tmp_path, make_video, read_numbers):
    if how["codec"] not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {how['codec']}")
    path = make_video(tmp_path / f"video{suffix}", frames=30, **how)
    every = decode_all(path)
    clip = read_clip(path, lambda n: segment_indices(n, 8))
    assert read_numbers(every) == list(range(30))
    assert clip.frame_count == 30 == count_frames(path)
    assert clip.indices == tuple(segment_indices(30, 8))
    assert np.array_equal(clip.frames, every[list(clip.indices)])
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (8, 48, 64, 3)
    assert list(clip.pts_seconds) == sorted(clip.pts_seconds)


def test_xvid_with_packed_b_frames_has_exact_frames(packed_xvid, read_numbers):
    frames = probe(packed_xvid).frames
    count = count_frames(packed_xvid)
    with av.open(str(packed_xvid)) as container:
        promised = container.streams.video[0].frames
    assert (count, promised) == (39, 40)
    assert frames <= promised
    for wanted in (1, 2, 8, 16, 39, 45):
        clip = read_clip(packed_xvid, lambda n, k=wanted: segment_indices(n, k))  # type: ignore[misc]
        assert clip.frame_count == 39
        assert clip.indices == tuple(segment_indices(39, wanted))
        assert read_numbers(clip.frames[:, 40:]) == list(clip.indices)
    times = read_clip(packed_xvid, lambda n: range(n)).pts_seconds
    assert all(a < b for a, b in pairwise(times)) and times[-1] == pytest.approx(38 / 25, abs=0.05)


def test_up_to_three_missing_frames_cost_no_second_pass(packed_xvid, tmp_path, make_video, monkeypatch):
    three_short = make_video(tmp_path / "short.avi", frames=30, codec="mjpeg", pixel_format="yuvj420p")
    write_packets(three_short, lambda number, packet: b"junk" * 8 if number in (5, 6, 20) else bytes(packet))
    opened = []
    once = video.open_video

    def spy(path, **how):
        opened.append(path)
        return once(path, **how)

    monkeypatch.setattr(video, "open_video", spy)
    for path, count in ((packed_xvid, 39), (three_short, 27)):
        assert read_clip(path, lambda n: segment_indices(n, 8)).frame_count == count
        assert opened.count(path) == 1


@pytest.mark.parametrize("broken", [{4}, {0}, {11}, {2, 3, 5, 7, 8, 10}])
def test_frames_that_do_not_decode_are_left_out_and_the_count_is_exact(
    broken, tmp_path, make_video, read_numbers
):
    path = make_video(tmp_path / "video.avi", frames=12, codec="mjpeg", pixel_format="yuvj420p")
    write_packets(path, lambda number, packet: b"junk" * 8 if number in broken else bytes(packet))
    assert probe(path).frames == 12
    left = [number for number in range(12) if number not in broken]
    clip = read_clip(path, lambda n: segment_indices(n, 4))
    assert clip.frame_count == len(left)
    assert read_numbers(clip.frames) == [left[index] for index in segment_indices(len(left), 4)]


def test_known_false_and_repeated_counts_give_exact_frames(tmp_path, make_video, read_numbers):
    path = make_video(tmp_path / "video.avi", frames=20, codec="mjpeg", pixel_format="yuvj420p")
    first = read_clip(path, lambda n: [0, n // 4])
    write_packets(path, lambda number, packet: b"junk" * 8 if number > 10 else bytes(packet))
    again = read_clip(path, lambda n: [0, n // 4], known=20)
    assert again.frame_count == 20
    assert np.array_equal(first.frames, again.frames)
    path = make_video(tmp_path / "video.avi", frames=10)
    clip = read_clip(path, lambda n: [0, n - 1], known=30)
    assert clip.frame_count == 10
    assert read_numbers(clip.frames) == [0, 9]
    path = make_video(tmp_path / "video.avi", frames=3)
    clip = read_clip(path, lambda n: segment_indices(n, 6))
    assert read_numbers(clip.frames) == [0, 1, 2, 2, 2, 2]
    assert clip.pts_seconds[2:] == (clip.pts_seconds[2],) * 4


@pytest.mark.parametrize(
    ("height", "width", "short_side", "shape"),
    [(48, 64, 24, (24, 32)), (64, 48, 24, (32, 24)), (48, 64, 48, (48, 64)), (48, 64, 96, (48, 64))],
)
def test_the_short_side_is_scaled_down_and_never_up(height, width, short_side, shape, tmp_path, make_video):
    path = make_video(tmp_path / "video.avi", frames=3, height=height, width=width)
    assert read_clip(path, lambda n: [0], short_side=short_side).frames.shape[1:3] == shape


def test_frames_scaled_down_a_lot_are_the_same_as_those_kept_raw(tmp_path, make_video):
    path = make_video(tmp_path / "video.avi", frames=6, height=256, width=320)
    clip = read_clip(path, lambda n: [1, 4], short_side=16)
    single = read_clip(path, lambda n: [4], short_side=16, known=6)
    assert clip.frames.shape == (2, 16, 20, 3)
    assert np.array_equal(clip.frames[1], single.frames[0])


@pytest.mark.parametrize("degrees", [90, 270])
def test_a_turned_picture_is_shown_upright(degrees, tmp_path):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # white corner, top left as stored
    path = tmp_path / "video.mp4"
    write_video(path, frames)
    set_rotation(path, degrees)
    info = probe(path)
    assert (info.width, info.height, info.rotation % 360) == (48, 64, -degrees % 360)
    picture = read_clip(path, lambda n: [n // 2], short_side=24).frames[0].astype(int)
    assert picture.shape == (32, 24, 3)
    top_right, bottom_left = picture[:6, -6:].mean(), picture[-6:, :6].mean()
    assert (top_right > 200, bottom_left > 200) == ((True, False) if degrees == 90 else (False, True))


MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", [*MIRRORED, (-1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0), (0, 2, 2, 0)])
def test_a_mirrored_or_turned_picture_is_shown_as_by_players(matrix, tmp_path):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :16, :16], frames[:, :16, -16:] = 255, 128  # corners at the top, as stored
    path = tmp_path / "video.mp4"
    write_video(path, frames)
    set_matrix(path, *matrix)
    a, b, c, d = matrix
    info = probe(path)
    assert (info.width, info.height) == ((64, 48) if a else (48, 64))
    assert info.mirrored == (a * d < b * c) and not info.note
    picture = read_clip(path, lambda n: segment_indices(n, 1), short_side=24).frames[0]
    for x, grey in ((-1, 255), (1, 128)):
        across, down = a * x - c, b * x - d  # of the corner (x, -1)
        corner = picture[
            slice(6) if down < 0 else slice(-6, None), slice(6) if across < 0 else slice(-6, None)
        ]
        assert corner.mean() == pytest.approx(grey, abs=20)
    assert np.array_equal(reading.read_clip(path, n_frames=1, short_side=24)[0], picture)


@pytest.mark.parametrize(
    ("matrix", "word"),
    [
        ((0, 0, 0, 0), "is no rotation"),
        ((0.7071, 0.7071, -0.7071, 0.7071), "turns it by 45°; 0° are applied"),
    ],
)
def test_a_matrix_that_is_no_quarter_turn_is_upright_and_said(matrix, word, tmp_path, make_video):
    path = make_video(tmp_path / "video.mp4")
    stored = decode_all(path)
    set_matrix(path, *matrix)
    info = probe(path)
    assert (info.rotation, info.mirrored) == (0, False) and word in info.note
    assert np.array_equal(decode_all(path), stored)
    assert all(word in frame.note for frame in iter_frames(path))


@pytest.mark.real
def test_the_fault_files_with_mirrors_and_nan_are_shown_right(real_data):
    ways = {"mirrored_matrix": lambda x: x[:, ::-1], "rotate_and_reflect": lambda x: x.swapaxes(0, 1)}
    for name, as_shown in ways.items():
        path = real_data / "faults" / f"{name}.mp4"
        with av.open(str(path)) as container:
            stored = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
        assert probe(path).mirrored
        assert np.abs(read_clip(path, lambda n: [0]).frames[0] - as_shown(stored)).mean() < 8
    info = probe(real_data / "faults" / "nan_matrix.mp4")
    assert info.rotation == 0 and "is no rotation" in info.note


def test_black_and_white_stay_black_and_white(tmp_path):
    frames = np.stack([np.full((48, 64, 3), level, np.uint8) for level in (0, 255)])
    write_video(tmp_path / "video.mkv", frames, codec="ffv1")
    levels = decode_all(tmp_path / "video.mkv").mean(axis=(1, 2, 3)).tolist()
    assert levels == [0, 255]


def test_frames_that_change_size_take_that_of_the_first(tmp_path, make_video, read_numbers):
    how = {"codec": "mpeg2video", "options": {"qmin": "2", "qmax": "2"}}
    small = make_video(tmp_path / "small.ts", frames=6, **how)
    large = make_video(tmp_path / "large.ts", frames=6, height=96, width=96, **how)
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    clip = read_clip(path, lambda n: range(n))
    assert clip.frames.shape[1:] == (48, 64, 3)
    assert clip.frame_count >= 11  # the seam may cost a frame
    numbers = read_numbers(clip.frames)
    assert numbers[:5] + numbers[-6:] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("height", "width"), [(1, 8000), (8000, 1)])
def test_a_video_of_8000x1_pixels_is_refused_by_name(height, width, tmp_path, make_video):
    path = tmp_path / "line.avi"
    write_video(path, np.zeros((3, height, width, 3), np.uint8), codec="png", pixel_format="rgb24")
    refused = re.escape(f"{path}: frames of {width}x{height} pixels; the long side may be at most 32 times")
    for read in (probe, count_frames, decode_all, lambda path: list(iter_frames(path, short_side=64))):
        with pytest.raises(VideoError, match=refused):
            read(path)
    with pytest.raises(ValueError, match=refused):
        reading.read_clip(path, n_frames=2, short_side=64)
    faults = [bool(reading.size_fault(*size)) for size in ((2048, 64), (2049, 64), (0, 0))]
    assert faults == [False, True, False]


def test_a_frame_that_becomes_too_large_is_not_decoded(tmp_path, make_video, monkeypatch):
    small = make_video(tmp_path / "small.ts", frames=6, codec="mpeg2video")
    large = make_video(tmp_path / "large.ts", frames=6, height=96, width=96, codec="mpeg2video")
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    for module in (video, reading):
        monkeypatch.setattr(module, "MOST_PIXELS", 64 * 48)
    assert count_frames(path) <= 6 and sum(1 for _ in reading.decoded(path)) <= 6
    with pytest.raises(VideoError, match="frames of 96x96 pixels; at most 3,072 pixels are read"):
        count_frames(large)


@pytest.mark.real
def test_the_fault_file_of_8000x1_pixels_is_refused(real_data):
    with pytest.raises(VideoError, match=r"8000x1\.mkv: frames of 8000x1 pixels"):
        read_clip(real_data / "faults" / "8000x1.mkv", lambda n: [0], short_side=224)


def test_probe_tells_what_a_file_holds_whatever_its_name(tmp_path, make_video, monkeypatch):
    path = make_video(tmp_path / "video.mkv", frames=30, rate=15, codec="libx264")
    info = probe(path)
    assert (info.codec, info.width, info.height, info.frames, info.rotation) == ("h264", 64, 48, 30, 0)
    assert info.rate == pytest.approx(15, rel=0.01)
    assert info.seconds == pytest.approx(2, rel=0.01)
    monkeypatch.chdir(tmp_path)
    for name in ("take:1.avi", "50%03d.avi", "süß walk.avi", "-y.avi"):
        path = make_video(Path(name), frames=2)
        assert path.exists()
        assert read_clip(path, lambda n: [n - 1]).frame_count == 2


def test_same_frames_are_the_same_bytes_and_low_quantisers_closer(tmp_path, make_video):
    assert make_video(tmp_path / "a.avi").read_bytes() == make_video(tmp_path / "b.avi").read_bytes()
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    far = []
    for quantiser in (2, 20):
        path = tmp_path / f"{quantiser}.avi"
        write_video(path, frames, quantiser=quantiser)
        far.append(np.abs(decode_all(path).astype(int) - frames).mean())
    assert far[0] < far[1]


def test_failed_writes_leave_the_old_file_and_odd_frames_are_refused(tmp_path, make_video):
    path = make_video(tmp_path / "video.mp4", frames=3)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"video\.mp4: the video could not be written"):
        make_video(path, height=47, width=63, codec="libx264")  # odd sizes have no 4:2:0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    for frames in (
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="uint8"):
            write_video(tmp_path / "video.avi", frames)  # type: ignore[arg-type]


def written(name, content):
    def make(folder, make_video):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def sound(name, *, cover=False):
    """A file of sound, with a picture on its cover or without."""

    def make(folder, make_video):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            if cover:
                art = container.add_stream("mjpeg", rate=1)
                art.width, art.height, art.pix_fmt = 64, 48, "yuvj420p"
                art.disposition = Disposition.attached_pic
                picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
                container.mux(art.encode(picture))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return folder / name

    return make


def _beheaded(folder, make_video):
    path = make_video(folder / "beheaded.mp4")
    path.write_bytes(path.read_bytes()[:600])
    return path


def _pipe(folder, make_video):
    os.mkfifo(folder / "pipe.avi")
    return folder / "pipe.avi"


def _undecodable(folder, make_video):
    path = make_video(folder / "undecodable.avi", codec="mjpeg", pixel_format="yuvj420p")
    write_packets(path, lambda number, packet: b"junk" * 8)
    return path


def _encrypted(folder, make_video):
    clear = make_video(folder / "clear.mp4", codec="libx264")
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "ab" * 16, "encryption_kid": "cd" * 16}
    path = folder / "encrypted.mp4"
    with av.open(str(clear)) as source, av.open(str(path), "w", container_options=key) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return path


def _animated_webp(folder, make_video):
    pictures = [Image.new("RGB", (64, 48), (40 * n, 90, 20)) for n in range(4)]
    pictures[0].save(folder / "animated.webp", save_all=True, append_images=pictures[1:], duration=40)
    return folder / "animated.webp"


LIST = b"ffconcat version 1.0\nfile "
NO_LIST = "a list of videos (ffconcat) with files that are missing or not in its folder"
UNREADABLE = {
    "no file": (lambda folder, make_video: folder / "absent.avi", "no such file"),
    "folder": (lambda folder, make_video: folder, "is a folder"),
    "empty": (written("empty.avi", b""), "the file is empty"),
    "pipe": (_pipe, "is no file but a pipe or a device"),
    "text": (written("text.avi", b"not a video\n" * 100), "not a video"),
    "notes": (written("notes.txt", b"not a video\n" * 100), "not a video but a text file"),
    "sound": (sound("sound.mp4"), "no video in this file, only audio"),
    "sound with cover": (sound("cover.mp4", cover=True), "no video in this file, only a picture and audio"),
    "beheaded": (_beheaded, "not a video that FFmpeg can read"),
    "undecodable": (_undecodable, "0 frames decoded out of 12 packets"),
    "encrypted": (_encrypted, "is encrypted"),
    "webp": (_animated_webp, "an animated WebP, which FFmpeg cannot decode. Convert it to MP4 or GIF."),
    "list of missing": (written("list.mp4", LIST + b"absent.mp4\n"), NO_LIST),
    "list of elsewhere": (
        lambda folder, make_video: written("list.avi", LIST + bytes(make_video(folder / "a.mp4")))(folder, 0),
        NO_LIST,
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("read", [probe, count_frames, lambda path: read_clip(path, lambda n: [0])])
def test_what_cannot_be_read_is_named_with_the_reason(name, read, tmp_path, make_video):
    make, reason = UNREADABLE[name]
    path = make(tmp_path, make_video)
    with pytest.raises(VideoError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


@pytest.mark.real
def test_every_odd_file_ends_as_frames_or_as_a_named_error(real_data):
    files = sorted(path for path in (real_data / "odd").rglob("*") if path.is_file())
    read = {}
    for path in files:
        try:
            clip = read_clip(path, lambda n: segment_indices(n, 8), short_side=64)
        except TvitError as error:
            assert str(error).startswith(f"{path}: ")
            continue
        assert clip.frames.shape[0] == 8
        assert min(clip.frames.shape[1:3]) <= 64
        assert clip.frames.shape[3] == 3
        info = probe(path)
        assert (info.width > info.height) == (clip.frames.shape[2] > clip.frames.shape[1])
        assert 0 <= info.frames - clip.frame_count <= 3
        read[path.name] = clip.frame_count
    assert len(files) >= 50
    assert len(read) >= 38
    assert read["decord__corrupted.mp4"] == 49
    assert read["exoplayer__sample_sef_super_slow_motion.mp4"] == 435


@pytest.mark.real
def test_every_weizmann_clip_is_read(real_data):
    files = sorted(path for path in (real_data / "weizmann").rglob("*") if path.suffix in VIDEO_SUFFIXES)
    assert len(files) == 90
    for path in files:
        clip = read_clip(path, lambda n: segment_indices(n, 8), short_side=98)
        assert clip.frames.shape[:2] == (8, 98)
        assert 30 <= clip.frame_count <= 150
        assert clip.frames.std() > 10


def test_the_first_frame_tells_a_video_from_what_is_none(make_video, tmp_path):
    decode_first(make_video(tmp_path / "a.avi"))
    (tmp_path / "text.avi").write_text("not a video")
    with pytest.raises(VideoError, match="not a video"):
        decode_first(tmp_path / "text.avi")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_reads_leave_no_file_open_and_no_memory_behind(make_video, tmp_path):
    good = make_video(tmp_path / "good.avi")
    bad = tmp_path / "bad.avi"
    bad.write_bytes(good.read_bytes()[:600])

    def read(times):
        for _ in range(times):
            read_clip(good, lambda n: [0, n - 1])
            with contextlib.suppress(VideoError):
                read_clip(bad, lambda n: [0])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(list(Path("/proc/self/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")

    files, memory = read(100)  # the allocator's own pools fill first
    later_files, later_memory = read(500)
    assert later_files == files
    assert later_memory - memory < 4_000_000


def test_a_file_too_large_to_hold_is_read_twice_and_gives_the_same_clip(packed_xvid, monkeypatch):
    small = read_clip(packed_xvid, lambda n: segment_indices(n, 8))
    opened = []
    once = video.open_video
    monkeypatch.setattr(video, "_PACKET_BYTES", packed_xvid.stat().st_size - 1)
    monkeypatch.setattr(video, "open_video", lambda path: opened.append(path) or once(path))
    clip = read_clip(packed_xvid, lambda n: segment_indices(n, 8))
    assert opened == [packed_xvid] * 2
    assert (clip.indices, clip.pts_seconds, clip.frame_count) == (small.indices, small.pts_seconds, 39)
    assert np.array_equal(clip.frames, small.frames)


LATE = 300  # frames before and after the sound: more than FFmpeg reads to find the streams


def with_sound(path):
    """A second of video with sound, as MPEG-TS."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("mp2", rate=48000)
        for n in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * n, np.uint8), format="rgb24")
            frame.pts = n
            container.mux(video.encode(frame))
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48000), np.int16), format="s16", layout="stereo")
        noise.sample_rate = 48000
        container.mux(audio.encode(noise))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path.read_bytes()


def late_stream(path):
    """Three MPEG-TS files joined, of which only the second has sound: FFmpeg finds it while it reads the packets."""
    noise = np.random.default_rng(0).integers(0, 255, (LATE, 48, 48, 3)).astype(np.uint8)
    silent, second = path.with_name("silent.part.ts"), path.with_name("second.part.ts")
    write_video(silent, noise, quantiser=8)
    path.write_bytes(silent.read_bytes() + with_sound(second) + silent.read_bytes())
    silent.unlink()
    second.unlink()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "model", tuple(tiny.COLOURS))


@pytest.fixture
def data(tmp_path):
    """Three classes of six sound videos."""
    return tiny.make_clips(tmp_path / "data")


def test_a_late_stream_costs_no_frame_also_in_the_exported_reader(tmp_path, monkeypatch):
    path = late_stream(tmp_path / "late.ts")
    with av.open(str(path)) as source:
        assert len(source.streams) == 1  # PyAV raises an IndexError for the other at the end
    frames = LATE + 25 + LATE
    assert count_frames(path) == frames and not scan_video(path).problem
    assert read_clip(path, lambda count: [0, count - 1]).frame_count == frames
    assert sum(1 for _ in iter_frames(path)) == frames
    package = Path(tvit_cli.__file__).parent
    (tmp_path / "exported").mkdir()
    shutil.copy(package / "portable" / "reading.py", tmp_path / "exported")
    monkeypatch.syspath_prepend(tmp_path)
    reading = importlib.import_module("exported.reading")
    assert sum(1 for _ in reading.decoded(path)) == LATE + 25 + LATE


def test_every_command_reads_a_video_with_a_late_stream(data, model, tmp_path):
    late_stream(data / "Red" / "v_Red_g07_c01.ts")
    reads_all(data, model, tmp_path, videos=19)


def reads_all(data, model, tmp_path, videos):
    """Every command goes to its end with all of these videos."""
    answer = predict(PredictSettings(paths=(str(data),), model=model, device="cpu"))
    assert len(answer.predictions) == videos and not any(p.error for p in answer.predictions)
    result = predict_timelines(PredictSettings(paths=(str(data),), model=model, device="cpu", window=0.2))
    assert len(result) == videos and not any(t.error for t in result)
    checked = check(ExtractSettings(path_to_data=str(data), check=True, num_workers=0), lambda event: None)
    assert len(checked) == videos and not any(scan.problem for scan in checked)
    store = tmp_path / "store"
    stored = extract(ExtractSettings(path_to_data=str(data), output=store, num_workers=0), lambda event: None)
    assert stored.videos == videos and not stored.unreadable
    result = tiny.run(
        path_to_data=str(data), working_directory=tmp_path / "runs", hf_model_name=None, width=16, depth=1,
        num_heads=2, train="all", epochs=1,
    )  # fmt: skip
    assert result.model.is_dir()


ERRORS = [
    IndexError("list index out of range"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    OverflowError("too large"), ValueError("no such thing"), RuntimeError("anything else"),
]  # fmt: skip


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def failing(request, monkeypatch):
    """Opening a file of a name with "bad" in it raises an error that is not FFmpeg's."""
    really = av.open

    def fail(path, *given, **named):
        if "bad" in path:
            raise request.param
        return really(path, *given, **named)

    monkeypatch.setattr(video.av, "open", fail)
    return type(request.param).__name__


def test_any_error_of_the_reader_names_one_video(failing, data, model, tmp_path):
    bad = data / "Red" / "v_bad_g07_c01.avi"
    shutil.copyfile(data / "Red" / "v_Red_g01_c01.avi", bad)
    with pytest.raises(VideoError, match=rf"v_bad_g07_c01\.avi: cannot be read \({failing}: "):
        read_clip(bad, lambda count: [0])
    answer = predict(PredictSettings(paths=(str(data),), model=model, device="cpu"))
    assert [failing in p.error for p in answer.predictions].count(True) == 1
    (result,) = predict_timelines(PredictSettings(paths=(str(bad),), model=model, device="cpu", window=0.2))
    assert failing in result.error
    if failing != "IndexError":  # all are caught at one place; the other commands are shown with one of them
        return
    checked = check(ExtractSettings(path_to_data=str(data), check=True, num_workers=0), lambda event: None)
    assert [scan.path.name for scan in checked if scan.problem] == [bad.name]
    how = {"path_to_data": str(data), "output": tmp_path / "store", "num_workers": 0}
    stored = extract(ExtractSettings(**how, max_bad="1"), lambda event: None)
    assert stored.videos == 18 and list(stored.unreadable) == [f"Red/{bad.name}"]
    with pytest.raises(RunError, match="1 of 19 videos cannot be read"):
        extract(ExtractSettings(**how, max_bad="0"), lambda event: None)
    facts = {
        "path_to_data": str(data), "working_directory": tmp_path / "runs", "hf_model_name": None,
        "width": 16, "depth": 1, "num_heads": 2, "train": "all", "epochs": 1,
    }  # fmt: skip
    assert tiny.run(**facts, max_bad="1").model.is_dir()
    with pytest.raises(DataError, match="1 of 19 videos cannot be read"):
        tiny.run(**facts, max_bad="0")


@pytest.mark.parametrize("error", ERRORS[:4], ids=lambda error: type(error).__name__)
def test_frames_before_an_error_of_the_demuxer_are_kept(error, tmp_path, make_video, monkeypatch):
    class Broken:
        def __init__(self, source):
            self.source = source

        def demux(self, stream):
            for number, packet in enumerate(self.source.demux(stream)):
                if number == 7:
                    raise error
                yield packet

    path = make_video(tmp_path / "a.avi", codec="mjpeg", pixel_format="yuvj420p")
    really = video.demux
    broken = lambda place, source, stream: really(place, Broken(source), stream)  # noqa: E731
    monkeypatch.setattr("tvit_cli.data.video.demux", broken)
    assert count_frames(path) == 7


def film(path, times):
    """A grey video with a frame at each of these seconds."""
    with video_writer(path) as writer:
        for number, time in enumerate(times):
            grey = np.full((32, 48, 3), 60 + 140 * (number % 2), np.uint8)
            writer.write(grey, time, time + 0.04)
    return path


def steady(start, seconds):
    return [start + n / 25 for n in range(round(seconds * 25))]


@pytest.mark.parametrize("gap", [20.0, 3600.0, 1e6])
def test_windows_and_segments_leave_out_a_gap(gap, model, tmp_path):
    path = film(tmp_path / "gap.mkv", steady(0, 3) + steady(gap, 2))
    notes = []
    output = tmp_path / "out"
    (result,) = predict_timelines(
        PredictSettings(paths=(str(path),), model=model, device="cpu", window=1.0, stride=0.5, output=output),
        notes.append,
    )
    assert result.timeline is not None
    assert len(result.timeline.scores) == 5 + 3 and len(result.timeline.smoothed) == 6 + 4
    assert result.timeline.seconds == pytest.approx(gap + 2, abs=0.05)
    rows = list(csv.DictReader((output / "gap" / "timeline.csv").read_text().splitlines()))
    assert [float(row["start"]) for row in rows] == pytest.approx(
        [0, 0.5, 1, 1.5, 2, gap, gap + 0.5, gap + 1], abs=0.05
    )
    for segment in result.timeline.segments:
        assert segment.end <= 3.05 or segment.start >= gap - 0.05
    assert result.timeline.segments[0].start == 0
    assert result.timeline.segments[-1].end == result.timeline.seconds
    assert any("gaps of more than 10 s" in note.text for note in notes if isinstance(note, Note))
    assert timeline_png(result.timeline)


def forged(path, frames, number):
    """An FLV at 25 frames per second of which one frame's time stamp has a bit set: 12 days too late."""
    levels = (60 + 3 * np.arange(frames) % 140).astype(np.uint8)
    pictures = np.broadcast_to(levels[:, None, None, None], (frames, 32, 48, 3)).copy()
    write_video(path, pictures, codec="flv1")
    data = bytearray(path.read_bytes())
    place, seen = 13, 0  # behind the header
    while place < len(data):
        if data[place] == 9:  # video
            if seen == number:
                data[place + 7] = 0x3F  # bits 24 to 31 of the milliseconds
            seen += 1
        place += 11 + int.from_bytes(data[place + 1 : place + 4], "big") + 4
    path.write_bytes(data)
    return path


def test_forged_and_far_time_stamps_make_no_gap_and_true_times(model, tmp_path):
    path = forged(tmp_path / "forged.flv", 75, 40)
    played = list(iter_frames(path))
    assert [p.start for p in played] == pytest.approx(steady(0, 3), abs=0.05)
    timeline = load_model(model, device="cpu").timeline(path, window=1.0, stride=0.5)
    assert len(timeline.scores) == 5 and timeline.seconds == pytest.approx(3, abs=0.05)
    path = film(tmp_path / "apart.mkv", [0, 0.04, 1000, 1000.04])
    timeline = load_model(model, device="cpu").timeline(path, window=2.0)
    assert len(timeline.scores) == 1
    assert [s.start for s in timeline.segments] == pytest.approx([0, 1000], abs=0.01)
    assert all(s.end - s.start < 1 for s in timeline.segments)


def test_annotated_frames_between_gaps_carry_only_labels_of_their_own(model, tmp_path):
    path = film(tmp_path / "gap.mkv", [*steady(0, 2), 50.0, *steady(100, 2)])
    timeline = load_model(model, device="cpu").timeline(path, window=1.0)
    annotate(tmp_path / "out.mkv", path, timeline.segments)
    pictures = read_clip(tmp_path / "out.mkv", range).frames
    plain = read_clip(path, range).frames
    differences = np.abs(pictures.astype(int) - plain).max(axis=(1, 2, 3))
    assert (differences > 40).tolist() == [True] * 50 + [False] + [True] * 50


def test_predict_and_check_say_that_a_nan_matrix_is_not_applied(model, tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.full((12, 48, 64, 3), 90, np.uint8))
    set_matrix(path, 0, 0, 0, 0)
    how = {"paths": (str(path),), "model": model, "device": "cpu"}
    said = Note(f"{path}: its display matrix is no rotation, so it is shown as stored.", "warning")
    for run, more in ((predict, {}), (predict_timelines, {"window": 0.2})):
        events = []
        run(PredictSettings(**how, **more), events.append)
        assert events.count(said) == 1
    scan = scan_video(path)
    assert scan.is_readable and scan.problem in said.text


def test_a_left_crop_of_h264_is_exact(tmp_path):
    """FFmpeg rounds it down to a multiple of 32 pixels unless memory may be unaligned."""
    picture = np.kron(np.random.default_rng(0).integers(0, 256, (8, 12, 3)), np.ones((16, 16, 1))).astype(
        np.uint8
    )
    with av.open(tmp_path / "whole.mp4", "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for _ in range(4)]
        out.mux([packet for frame in (*frames, None) for packet in stream.encode(frame)])
    crop = "h264_mp4toannexb,h264_metadata=crop_left=26:crop_right=6:crop_top=10:crop_bottom=4"
    with av.open(tmp_path / "whole.mp4") as whole, av.open(tmp_path / "crop.h264", "w") as out:
        source = whole.streams.video[0]
        cut = BitStreamFilterContext(crop, source, out.add_stream_from_template(source))
        packets = [packet for packet in whole.demux(source) if packet.dts is not None]
        out.mux([new for packet in (*packets, None) for new in cut.filter(packet)])
    (first,) = read_clip(tmp_path / "crop.h264", lambda count: [0]).frames
    exported = reading.read_clip(tmp_path / "crop.h264", n_frames=1, short_side=114, frame_grid=None)[0]
    for found in (first, exported):
        assert found.shape == (114, 160, 3)
        assert np.abs(found.astype(int) - picture[10:-4, 26:-6]).mean() < 12


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_pictures_that_are_turned_or_mirrored_are_shown_upright(orientation, tmp_path):
    corners = np.zeros((64, 96, 3), np.uint8)
    corners[:, :48, 0] = corners[:32, :, 1] = 255
    picture = Image.fromarray(corners)
    picture.getexif()[0x112] = orientation
    picture.save(tmp_path / "a.avif", exif=picture.getexif().tobytes(), quality=100)
    upright = np.asarray(ImageOps.exif_transpose(picture)).astype(int)
    (found,) = read_clip(tmp_path / "a.avif", lambda count: [0]).frames
    assert found.shape == upright.shape and np.abs(found - upright).mean() < 12


@pytest.mark.real
def test_the_late_stream_of_the_fault_files_costs_no_frame(real_data):
    path = real_data / "faults" / "late_stream.ts"
    assert count_frames(path) == 400 and not scan_video(path).problem


@pytest.mark.real
def test_the_gap_of_the_fault_files_makes_no_windows(real_data, model):
    path = real_data / "faults" / "gap_in_timestamps.flv"
    timeline = load_model(model, device="cpu").timeline(path, window=0.2, stride=0.1)
    assert timeline.seconds == pytest.approx(18 / 25, abs=0.01) and len(timeline.scores) == 6


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A video of some hundred kilobytes: more than FFmpeg reads to open it."""
    path = tmp_path_factory.mktemp("noise") / "noise.avi"
    write_video(path, np.random.default_rng(0).integers(0, 256, (40, 96, 128, 3)).astype(np.uint8))
    assert path.stat().st_size > 400_000
    return path.read_bytes()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (3_000, "no answer within 1 s. Try again, or"),
        (300_000, "no answer within 1 s.*Try again, or download"),
    ],
)
def test_a_url_that_stalls_is_an_error_and_gives_no_label(noise, sent, said, monkeypatch):
    monkeypatch.setattr(video, "URL_TIMEOUT", 1.0)
    with serving() as server:
        url = server.add("/a.avi", noise, chunk=sent, seconds_per_chunk=5.0)
        for read in (lambda: read_clip(url, lambda count: [0]), lambda: list(iter_frames(url))):
            with pytest.raises(VideoError, match=rf"a\.avi: .*{said}"):
                read()


def test_a_url_that_breaks_off_is_an_error_and_gives_no_label(noise):
    with serving() as server:
        url = server.add("/a.avi", noise, cut_after=300_000)
        with pytest.raises(VideoError, match=r"a\.avi: the connection broke off after .* kB.*Try again"):
            read_clip(url, lambda count: [0])


@pytest.mark.parametrize(
    ("name", "limit", "said"),
    [("URL_BYTES", 300_000, "sends more than 300 kB"), ("URL_SECONDS", 0.0, "takes more than 0 min")],
)
def test_an_endless_url_is_an_error_and_no_full_memory(noise, name, limit, said, monkeypatch):
    monkeypatch.setattr(video, name, limit)
    with serving() as server:
        url = server.add("/a.avi", noise, no_length=True, ranges=False)
        for read in (lambda: read_clip(url, lambda count: [0]), lambda: list(iter_frames(url))):
            words = rf"a\.avi: {said}.*without an end\? Add --window 2s --follow"
            with pytest.raises(VideoError, match=words):
                read()
