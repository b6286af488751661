"""Frame stores: contents, colours, nearest frames, damage, scale."""

import errno
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from stores import LABELS, PARAMETERS, make_store, write_synthetic_index
from videos import set_matrix, set_rotation, write_solid_colour

from tvit_cli.data import framestore
from tvit_cli.data.clips import ClipDataset, load_batches
from tvit_cli.data.framestore import FrameStore, check_record, find_store, nearest
from tvit_cli.data.framestore_format import CRC, FRAME, Header, Parameters, write_header
from tvit_cli.data.framestore_writer import ShardWriter, pack_video, read_contents, shard_paths
from tvit_cli.data.layout import Video, read_layout
from tvit_cli.data.video import read_clip, read_frames
from tvit_cli.data.video_writer import write_video
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.portable.reading import grid_indices, segment_indices

LENGTHS = {"v_run_g01_c01.avi": 40, "v_run_g02_c01.avi": 5, "v_walk_g01_c01.avi": 23, "v_walk_g02_c01.avi": 8}
JPEG_ERROR = 2  # mean of absolute differences, of 255


def textured(count, height=120, width=160):
    """A smooth texture that moves: JPEG's error on it is what it is on natural pictures, or more."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([128 + 90 * np.sin((x + 3 * t) / 9) * np.cos(y / 7), x * 255 / width, y * 255 / height], -1)
        for t in range(count)
    ]
    return np.stack(frames).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    found = []
    for name, frames in LENGTHS.items():
        label = name.split("_")[1]
        write_video(root / label / name, textured(frames))
        found.append(Video(root / label / name, f"{label}/{name}", label, "train", name.split("_")[2]))
    return found


@pytest.fixture(scope="module")
def store(videos, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "frames", videos, shard_bytes=60_000)


@pytest.fixture
def own_store(videos, tmp_path):
    """A store that a test may damage; one shard."""
    return make_store(tmp_path / "frames", videos)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_the_grid_is_read_back_in_time_order_with_its_times(store, videos):
    assert len(store) == len(videos)
    assert len(shard_paths(store.folder)) > 1
    for video in videos:
        frames = LENGTHS[video.path.name]
        clip = store.read(video.name, lambda count: grid_indices(count, 8))
        direct = read_clip(video.path, lambda count: grid_indices(count, 8))
        assert clip.frame_count == frames
        assert clip.indices == direct.indices == tuple(sorted(set(segment_indices(frames, 8))))
        assert clip.pts_seconds == direct.pts_seconds
        assert clip.frames.shape == direct.frames.shape
        error = np.abs(clip.frames.astype(int) - direct.frames).mean()
        assert 0 < error < JPEG_ERROR


def test_the_answer_names_the_nearest_frames_that_it_gives(store, videos):
    clip = store.read(videos[0].name, lambda count: [0, 7, 7, 20, 39])
    assert grid_indices(40, 8) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert clip.indices == (2, 7, 7, 22, 37)
    assert (clip.frames[1] == clip.frames[2]).all()
    direct = read_clip(videos[0].path, lambda count: clip.indices)
    assert np.abs(clip.frames.astype(int) - direct.frames).mean() < JPEG_ERROR
    stored = np.array([1, 4, 8, 10], np.uint32)
    wanted = list(range(13))
    expected = [min(range(4), key=lambda k: (abs(int(stored[k]) - w), k)) for w in wanted]
    assert nearest(stored, wanted) == expected
    assert nearest(stored[:1], wanted) == [0] * 13
    frames = textured(20).astype(int)
    assert np.abs(frames[1:] - frames[:-1]).mean(axis=(1, 2, 3)).min() > 1.5 * JPEG_ERROR


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n_frames", [3, 8, 12])
def test_on_the_same_grid_videos_and_store_choose_the_very_same_frames(
    store, videos, monkeypatch, training, n_frames
):
    seen = []

    def dataset(from_store):
        return ClipDataset(
            videos, LABELS, n_frames=n_frames, short_side=256, seed=3, training=training, store=from_store,
            grid=8,
        )  # fmt: skip

    inner_video, inner_store = framestore.Clip, dataset(store)

    def spy(*args, **how):
        clip = inner_video(*args, **how)  # type: ignore[arg-type]
        seen.append(clip.indices)
        return clip

    monkeypatch.setattr(framestore, "Clip", spy)
    monkeypatch.setattr("tvit_cli.data.video.Clip", spy)
    for key in [(0, 0), (1, 0), (0, 1), (0, 2), (2, 3)]:
        a, b = dataset(None)[key], inner_store[key]
        assert (a.error, b.error) == ("", "")
        assert seen[-2] == seen[-1]
        assert set(seen[-1]) <= set(grid_indices(LENGTHS[videos[key[1]].path.name], 8))
        assert (a.frames.int() - b.frames.int()).abs().float().mean() < JPEG_ERROR
        assert b.frames.is_contiguous(memory_format=torch.channels_last)


def test_sampling_on_a_grid_is_sampling_of_its_positions():
    for frames in (1, 3, 8, 9, 100):
        kept = grid_indices(frames, 8)
        assert len(kept) == min(frames, 8)
        for n in (1, 5, 8, 11):
            chosen = segment_indices(frames, n, grid=8)
            assert chosen == sorted(chosen)
            assert len(chosen) == n
            assert set(chosen) <= set(kept)
    assert segment_indices(16, 2, grid=4) == [6, 14]
    assert segment_indices(100, 8, grid=8) == grid_indices(100, 8)


def test_large_frames_are_stored_smaller_and_small_ones_as_they_are(tmp_path):
    write_video(tmp_path / "large.avi", textured(2, 400, 600))
    write_video(tmp_path / "small.avi", textured(2, 50, 40))
    names = ("large.avi", "small.avi")
    videos = [Video(tmp_path / name, name, "run", "train", None) for name in names]
    store = make_store(tmp_path / "frames", videos, short_side=200)
    assert store.read("large.avi", lambda n: [0]).frames.shape == (1, 200, 300, 3)
    assert store.read("small.avi", lambda n: [0]).frames.shape == (1, 50, 40, 3)


@pytest.mark.parametrize(
    ("short_side", "shape"),
    [(None, (120, 160)), (500, (120, 160)), (61, (120, 160)), (60, (60, 80)), (20, (30, 40)), (1, (15, 20))],
)
def test_decoding_scales_down_by_halves_and_never_below_what_is_asked(store, videos, short_side, shape):
    clip = store.read(videos[0].name, lambda n: [2, 37], short_side=short_side)
    assert clip.frames.shape == (2, *shape, 3)
    whole = store.read(videos[0].name, lambda n: [2, 37]).frames
    step = 120 // shape[0]
    means = whole.reshape(2, shape[0], step, shape[1], step, 3).mean(axis=(2, 4))
    assert np.abs(means - clip.frames).mean() < 3


def test_odd_sizes_scale_too(tmp_path):
    write_video(tmp_path / "odd.mkv", textured(2, 121, 163), codec="ffv1", pixel_format="bgr0")
    store = make_store(tmp_path / "frames", [Video(tmp_path / "odd.mkv", "odd.mkv", "run", "train", None)])
    for short_side, shape in ((121, (121, 163)), (61, (61, 82)), (31, (31, 41)), (16, (16, 21))):
        assert store.read(0, lambda n: [0], short_side=short_side).frames.shape == (1, *shape, 3)


def test_names_of_every_kind_are_found(tmp_path, videos):
    names = ["a.avi", "Z/é.avi", "Z/\U0001f600.avi", "b\udcff.avi", "aa.avi", "dir with space/ü.avi"]
    given = [Video(videos[1].path, name, "run", "test", None) for name in names]
    store = make_store(tmp_path / "frames", given)
    assert sorted(store.name(i) for i in range(len(names))) == sorted(names)
    for name in names:
        index = store.find(name)
        assert index is not None
        assert store.name(index) == name
    assert store.find("ab.avi") is store.find("") is store.find("zzz") is None


def test_a_store_keeps_its_layout_and_names_a_clip_it_lacks(store, videos):
    layout = store.layout()
    assert layout.labels == LABELS
    facts = [(v.name, v.label, v.subset, v.group) for v in videos]
    assert [(v.name, v.label, v.subset, v.group) for v in layout.videos] == facts
    said = r"missing\.avi: not in the frame store .*tvit extract --path-to-data"
    with pytest.raises(VideoError, match=said):
        store.read("missing.avi", lambda n: [0])


def test_a_store_can_be_pickled_and_read_in_another_process(store, videos):
    first = store.read(videos[0].name, lambda n: [0])
    text = pickle.dumps(store)
    assert len(text) < 1_000  # the path, no tables and no open files
    assert (pickle.loads(text).read(videos[0].name, lambda n: [0]).frames == first.frames).all()
    data = ClipDataset(videos, LABELS, n_frames=4, short_side=64, seed=0, training=True, store=store)
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=[[(0, 0)], [(0, 1)]], num_workers=1, collate_fn=list,
            multiprocessing_context=context,
        )  # fmt: skip
        for index, items in enumerate(loader):
            assert torch.equal(items[0].frames, data[(0, index)].frames)


def test_few_shards_are_open_at_a_time(store, videos, monkeypatch):
    monkeypatch.setattr(framestore, "MOST_OPEN_SHARDS", 1)
    fresh = FrameStore(store.folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        for video in videos:
            fresh.read(video.name, lambda n: [0])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_flipped_bit_anywhere_in_a_record_is_noticed(own_store, videos):
    contents, _ = read_contents(own_store.folder)
    name = videos[0].name
    row, shard = contents.row(name), contents.shard(name)
    assert row is not None
    good = shard.read_bytes()
    start, size = int(row["offset"]), int(row["bytes"])
    for place in [
        start,
        start + 161,
        start + 163,
        *range(start + 170, start + size, 1_000),
        start + size - 1,
    ]:
        flip(shard, place)
        assert "checksum" in check_record(shard, row)
        with pytest.raises(VideoError, match=rf"^{name}: its record in .* is damaged .*--repair"):
            own_store.read(name, lambda n: grid_indices(n, 8))
        own_store.read(videos[1].name, lambda n: [0])  # the others are unharmed
        shard.write_bytes(good)
    assert check_record(shard, row) == ""


def test_a_damaged_clip_is_set_aside_by_name_in_training(own_store, videos):
    flip(shard_paths(own_store.folder)[0], 200)
    data = ClipDataset(videos, LABELS, n_frames=8, short_side=64, seed=0, training=False, store=own_store)
    items = [data[(0, index)] for index in range(4)]
    assert [item.weight for item in items] == [0, 1, 1, 1]
    assert items[0].error.startswith(videos[0].name)


def test_unreadable_stored_clip_is_named_and_the_others_are_read(own_store, videos, monkeypatch):
    contents, _ = read_contents(own_store.folder)
    row = contents.row(videos[1].name)
    assert row is not None
    bad, read = int(row["offset"]), framestore._File.read

    def failing(file, offset, size):
        if bad <= offset < bad + int(row["bytes"]):
            raise OSError(errno.EIO, "Input/output error")
        return read(file, offset, size)

    monkeypatch.setattr(framestore._File, "read", failing)
    data = ClipDataset(videos, LABELS, n_frames=8, short_side=64, seed=0, training=False, store=own_store)
    batches = list(load_batches(data, [[(0, 0), (0, 1)], [(0, 2), (0, 3)]], workers=2))
    assert [batch.weights.tolist() for batch in batches] == [[1, 0], [1, 1]]
    ((index, reason),) = batches[0].errors
    shard = shard_paths(own_store.folder)[0]
    assert index == 1
    assert reason.startswith(f"{videos[1].name}: {shard} cannot be read there (Input/output error). ")


@pytest.mark.parametrize("keep", [0, 10, 5_000, -1])
def test_a_truncated_shard_is_named_with_the_command_that_mends_it(own_store, keep):
    shard = shard_paths(own_store.folder)[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{shard.name}: this shard .* has .* bytes, not .*tvit extract"):
        FrameStore(own_store.folder)
    contents, damaged = read_contents(own_store.folder)
    assert not contents.rows
    assert shard.name in str(damaged[0])


def test_a_missing_shard_or_index_or_header_is_a_data_error(own_store):
    shard, folder = shard_paths(own_store.folder)[0], own_store.folder
    moved = shard.rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"is missing. Run `tvit extract --path-to-data"):
        FrameStore(folder)
    moved.rename(shard)
    (folder / "index.frames").unlink()
    with pytest.raises(DataError, match=r"unfinished .*Run `tvit extract"):
        FrameStore(folder)
    (folder / "store.json").unlink()
    with pytest.raises(DataError, match="no frame store"):
        FrameStore(folder)


def test_a_flipped_bit_in_the_index_is_noticed(own_store):
    index = own_store.folder / "index.frames"
    good = index.read_bytes()
    for place in range(0, len(good), 37):
        flip(index, place)
        with pytest.raises(DataError, match="damaged"):
            FrameStore(own_store.folder)
        index.write_bytes(good)
    for size in (0, 20, len(good) - 1):
        index.write_bytes(good[:size])
        with pytest.raises(DataError, match="damaged"):
            FrameStore(own_store.folder)


def test_a_store_of_a_later_version_and_an_empty_folder_are_refused(own_store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no frame store .*Make one with `tvit extract`"):
        FrameStore(tmp_path / "empty")
    header = own_store.folder / "store.json"
    header.write_text(header.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(DataError, match=r"version 9.*Update tvit"):
        FrameStore(own_store.folder)
    header.write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a frame store's header"):
        FrameStore(own_store.folder)


def test_a_full_disk_keeps_the_shards_that_were_complete(videos, tmp_path, monkeypatch):
    folder = tmp_path / "frames"
    write_header(folder, Header(PARAMETERS, str(tmp_path)))
    packed = pack_video(videos[1].path, PARAMETERS)
    writer = ShardWriter(folder, rank=0, shard_bytes=len(packed.record))

    def full(number):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"), writer:
        writer.add("a", packed)
        writer.add("b", packed)  # completes the first
        monkeypatch.setattr("tvit_cli.files.os.fsync", full)
        writer.add("c", packed)
    assert sorted(p.name for p in folder.iterdir()) == ["shard-00000-00.frames", "store.json"]


@pytest.mark.parametrize(("room", "kept"), [(3.5, 3), (3.001, 2), (0.5, 0)])
def test_a_full_disk_keeps_the_videos_of_an_unfinished_shard(videos, tmp_path, room, kept):
    folder = tmp_path / "frames"
    write_header(folder, Header(PARAMETERS, str(tmp_path)))
    packed = pack_video(videos[1].path, PARAMETERS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * len(packed.record)), before[1]))
    try:
        with (
            pytest.raises(RunError, match=r"too large.*Videos that were stored are kept"),
            ShardWriter(folder, rank=0, shard_bytes=1 << 30) as writer,
        ):
            for name in "abcde":
                writer.add(name, packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    contents, damaged = read_contents(folder)
    assert b"".join(sorted(contents.rows)) == b"abc"[:kept] and not damaged
    for name in "abc"[:kept]:
        row = contents.row(name)
        assert row is not None and check_record(contents.shard(name), row) == ""
    assert not list(folder.glob(".*"))


def test_the_store_beside_the_videos_is_found_and_is_no_class(videos, tmp_path):
    for video in videos:
        target = tmp_path / "data" / video.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(video.path.read_bytes())
    root = tmp_path / "data"
    assert find_store(root) is None
    make_store(root / "frames", videos)
    assert find_store(root) == find_store(root / "frames") == find_store(root / "list.csv") == root / "frames"
    layout = read_layout(root, group_pattern="_g(..)", val_groups="none", test_groups="none")
    assert layout.labels == LABELS
    store = FrameStore(root / "frames")
    assert store.outdated(layout.videos) == []
    write_video(layout.videos[0].path, textured(4))
    extra = Video(root / "new.avi", "new.avi", "run", "train", None)
    assert store.outdated([*layout.videos, extra]) == [layout.videos[0].name, "new.avi"]
    layout.videos[0].path.unlink()
    assert store.outdated(layout.videos) == []
    (root / "frames" / "index.frames").unlink()
    assert find_store(root) is None  # unfinished
    assert read_layout(root, group_pattern="_g(..)", val_groups="none", test_groups="none").labels == LABELS


def measure_index(folder):
    """Seconds to open a store's index, MiB of memory that this and 1,000 look-ups take, seconds of these.

    The peak begins anew here: that of a process that was just started is its parent's.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kibibytes()
    began = time.perf_counter()
    store = FrameStore(folder)
    opened = time.perf_counter()
    for n in range(0, len(store), max(1, len(store) // 1_000)):
        assert store.find(store.name(n)) == n
    ended = time.perf_counter()
    memory = (peak_kibibytes() - before) / 1024
    return opened - began, memory, ended - opened


def peak_kibibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_an_index_of_100_000_clips_opens_at_once_and_takes_little_memory(tmp_path):
    write_synthetic_index(tmp_path / "frames", 100_000)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_framestore import measure_index\n"
        f"print(*measure_index(Path({str(tmp_path / 'frames')!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, mebibytes, lookups = map(float, result.stdout.split())
    assert seconds < 0.5  # measured 0.03 s; a million clips may take 2 s
    assert mebibytes < 30  # a million clips may take 300 MB
    assert lookups < 2


@pytest.mark.real
def test_real_clips_come_back_as_they_were_but_for_jpeg(real_data, tmp_path):
    paths = sorted((real_data / "weizmann").rglob("*.avi"))[::15]
    videos = [Video(path, path.name, "run", "train", None) for path in paths]
    store = make_store(tmp_path / "frames", videos, frames_per_video=32)
    for video in videos:
        direct = read_clip(video.path, lambda n: grid_indices(n, 32))
        clip = store.read(video.name, lambda n: grid_indices(n, 32))
        assert (clip.indices, clip.pts_seconds) == (direct.indices, direct.pts_seconds)
        assert np.abs(clip.frames.astype(int) - direct.frames).mean() < 2.2  # measured 1.6 to 1.9


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
def test_planes_and_pictures_have_the_colours_of_the_source(
    space, full, height, matrix, form, short_side, rgb, tmp_path
):
    kr, kb = {"601": (0.299, 0.114), "709": (0.2126, 0.0722)}[matrix]
    red, green, blue = np.array(rgb) / 255
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    scale_y, low, scale_c = (255, 0, 255) if full else (219, 16, 224)
    yuv = (round(low + scale_y * luma), round(128 + scale_c * chroma[0]), round(128 + scale_c * chroma[1]))
    path = write_solid_colour(tmp_path / "video.mkv", yuv, height=height, space=space, full=full, form=form)
    colour = to_rgb(read_planes(path, short_side)[0]).mean(axis=(0, 1))
    assert np.abs(colour - rgb).mean() <= HALF
    if form == "yuv444p" and rgb == (200, 60, 30):  # by the tags, or players' rule where there are none
        picture = read_clip(path, lambda n: [0]).frames[0]
        assert np.abs(picture.reshape(-1, 3).mean(axis=0) - rgb).max() <= 1.5


@pytest.mark.parametrize(
    "pixel_format", ["gray", "gray10le", "yuv420p10le", "yuv444p", "bgra", "yuva420p", "rgb48le", "bgr0"]
)
def test_any_pixel_format_becomes_planes_and_rgb8(pixel_format, tmp_path, make_video, read_numbers):
    path = make_video(tmp_path / "video.mkv", frames=5, codec="ffv1", pixel_format=pixel_format)
    pictures = read_planes(path)
    assert {(p.y.shape, p.u.shape, p.v.shape) for p in pictures} == {((48, 64), (24, 32), (24, 32))}
    assert read_numbers(np.stack([to_rgb(p) for p in pictures])) == list(range(5))
    frames = read_clip(path, lambda n: range(n)).frames
    assert frames.shape == (5, 48, 64, 3) and read_numbers(frames) == list(range(5))
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
