"""Clips of a fixed number of seconds, from videos, arrays and frame stores, in every verb."""

import json
import shutil
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from stores import make_store

import tvit_cli
from tvit_cli.data.augment import Kind, draw_generator
from tvit_cli.data.clips import ClipDataset
from tvit_cli.data.layout import Video, split_choice
from tvit_cli.data.video import KeptFrames, iter_frames, read_frames
from tvit_cli.engine.dataset import ClipFormat, open_dataset
from tvit_cli.engine.predict.timeline import frame_positions, sliding_windows
from tvit_cli.engine.train.origin import settings_beneath
from tvit_cli.errors import DataError, SettingsError
from tvit_cli.files import FrameArray
from tvit_cli.model.pretrained_config import own_clips
from tvit_cli.portable import reading
from tvit_cli.settings.base import load
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.train import TrainSettings

TICKS = 90_000  # per second
RATES = {
    "23.976": Fraction(24000, 1001),
    "25": Fraction(25),
    "29.97": Fraction(30000, 1001),
    "60": Fraction(60),
}


def write(path: Path, stamps: list[int]) -> Path:
    """A video whose frame n is shown from `stamps[n]` ticks on, and is n grey levels from black."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, TICKS)
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane, value in zip(frame.planes, (16 + number % 220, 128, 128), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts, frame.time_base = stamp, Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Five seconds at several rates, at a variable rate, and three frames."""
    folder = tmp_path_factory.mktemp("films")
    made = {
        name: write(folder / f"{name}.nut", [round(n * TICKS / rate) for n in range(int(5 * rate))])
        for name, rate in RATES.items()
    }
    steps = np.random.default_rng(0).integers(1500, 9000, 100)
    made["variable"] = write(folder / "variable.nut", list(accumulate(steps.tolist(), initial=700)))
    made["three"] = write(folder / "three.nut", [0, 3600, 7200])
    return made


def stamps_of(path):
    """Time stamps by PyAV alone, in seconds since the first."""
    with av.open(str(path)) as container:
        times = [Fraction(frame.pts) * frame.time_base for frame in container.decode(video=0)]
    return [time - times[0] for time in times]


def expected(path, n_frames, seconds, place):
    """The last frame that starts by each time, by exact fractions and a plain search; and the end of the video."""
    stamps = stamps_of(path)
    with av.open(str(path)) as container:
        end = stamps[-1] + 1 / Fraction(container.streams.video[0].average_rate)
    step = Fraction(seconds) / n_frames
    start = Fraction(place) * max(Fraction(0), end - Fraction(seconds)) // step * step
    times = [start + number * step for number in range(n_frames)]
    slack = Fraction(1, 10**6)
    return [max(n for n, stamp in enumerate(stamps) if stamp <= time + slack) for time in times]


def dataset(path, **how):
    videos = [Video(path, path.name, "run", "train", None)]
    given = {"n_frames": 8, "short_side": 48, "seed": 0, "training": False, "clip_seconds": 1.6}
    return ClipDataset(videos, ["run"], **(given | how))


def indices(data, epoch=0):
    return list(data._read(epoch, 0).indices)


@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("name", [*RATES, "variable", "three"])
def test_frames_of_a_dense_clip_are_those_of_an_exact_search(films, name, clips):
    places = [Fraction(2 * clip + 1, 2 * clips) for clip in range(clips)]
    wanted = [index for place in places for index in expected(films[name], 8, "1.6", place)]
    assert indices(dataset(films[name], clips_per_video=clips)) == wanted
    direct = reading.read_clip(films[name], n_frames=8, short_side=48, clip_seconds=1.6)
    one = dataset(films[name])[(0, 0)]
    assert np.array_equal(direct, one.frames.permute(0, 2, 3, 1).numpy())
    assert ("its last frame is repeated" in one.note) == (name == "three")


def test_any_rate_gives_the_same_motion(films):
    for name in ("25", "60", "variable"):
        clip = dataset(films[name])._read(0, 0)
        steps = np.diff(clip.pts_seconds)
        assert np.allclose(steps, 0.2, atol=0.101)
        assert abs(clip.pts_seconds[-1] - clip.pts_seconds[0] - 1.4) < 0.101


def test_training_draws_the_place_of_a_clip_by_seed_epoch_and_video(films):
    data = dataset(films["60"], training=True)
    end = data._read(0, 0).times.end
    assert end == pytest.approx(5, abs=0.03)
    drawn = [indices(data, epoch) for epoch in range(20)]
    assert [indices(dataset(films["60"], training=True), epoch) for epoch in range(20)] == drawn
    assert len({tuple(row) for row in drawn}) > 15
    for epoch, row in enumerate(drawn):
        place = draw_generator(0, Kind.OFFSETS, epoch, 0).random() * (end - 1.6)
        assert row == [int((place + 0.2 * n) * 60 + 1e-4) for n in range(8)]


def test_known_times_spare_the_rest_of_the_video(films, monkeypatch):
    data = dataset(films["60"])
    first = indices(data)
    decoded = []
    data._known[0] = data._read(0, 0).times
    keep = KeptFrames.keep
    monkeypatch.setattr(KeptFrames, "keep", lambda self, n, frame: decoded.append(n) or keep(self, n, frame))
    assert indices(data) == first and sorted(decoded) == first


def test_packed_b_frames_have_the_frames_of_a_whole_reading(packed_xvid):
    starts = [(frame.start, frame.end) for frame in iter_frames(packed_xvid)]
    wanted = reading.dense_indices(reading.Times([s for s, _ in starts], starts[-1][1]), 8, 0.8)
    assert indices(dataset(packed_xvid, clip_seconds=0.8)) == wanted


@pytest.mark.parametrize("fps", [5, 10, 30])
@pytest.mark.parametrize("name", [*RATES, "variable", "three"])
def test_a_store_by_time_gives_the_clips_of_the_video(films, name, fps, tmp_path):
    video = Video(films[name], films[name].name, "run", "train", None)
    store = make_store(tmp_path / "frames", [video], frames_per_video=0, fps=fps)
    for clips in (1, 3):
        wanted = indices(dataset(films[name], clips_per_video=clips))
        assert indices(dataset(films[name], clips_per_video=clips, store=store)) == wanted
    if name == "25" and fps == 30:  # every frame is stored
        pairs = [dataset(films[name], training=True, store=source) for source in (None, store)]
        assert [indices(pairs[0], epoch) for epoch in range(9)] == [
            indices(pairs[1], epoch) for epoch in range(9)
        ]
    assert store.short_of(2) == 0


def test_an_array_of_frames_is_sampled_by_its_rate():
    frames = np.zeros((50, 8, 8, 3), np.uint8)
    data = ClipDataset([], ["run"], n_frames=4, short_side=8, seed=0, training=False, clip_seconds=0.8)
    choice = data._choice(0, 0)
    clip = read_frames(FrameArray(frames, 25.0), choice, KeptFrames.rgb)
    assert clip.indices == (15, 20, 25, 30)  # of 2 s, the clip begins at the step before 0.6 s


def test_the_window_of_a_timeline_is_the_clip(films):
    card = Preprocessing(n_frames=8, frame_size=48, clip_seconds=1.6)
    assert frame_positions(card, 1.6) == pytest.approx([n / 8 for n in range(8)])
    assert frame_positions(card, 3.2) == pytest.approx([0.25 + n / 16 for n in range(8)])
    windows = sliding_windows(
        iter_frames(films["25"]), length=1.6, stride=0.2, positions=frame_positions(card, 1.6)
    )
    clip = dataset(films["25"])[(0, 0)].frames.permute(0, 2, 3, 1).numpy()
    at = {round(window.start, 3): window.frames() for window in windows}
    assert np.array_equal(at[1.6], clip)  # the step before the middle: (5 - 1.6) / 2 = 1.7
    with pytest.raises(SettingsError, match=r"--window 1: the model takes clips of 1.6 s.*--window 1.6s"):
        frame_positions(card, 1.0)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"clip_seconds": 0}, "clip_seconds: 0: it should be greater than 0"),
        ({"clip_seconds": "none", "frame_grid": 4, "n_frames": 8}, "frame-grid"),
        ({"clip_seconds": "0.2s", "frame_grid": 8}, "--frame-grid 8: not with --clip-seconds"),
    ],
)
def test_bad_clips_in_seconds_are_refused(inputs, tmp_path, given, fault):
    with pytest.raises(SettingsError, match=fault) as caught:
        tvit_cli.train(**inputs, working_directory=tmp_path, **given)
    assert caught.value.exit_code == 2


def test_clips_longer_than_every_video_are_refused(inputs, tmp_path):
    with pytest.raises(
        DataError, match=r"--clip-seconds 60: longer than every video.*the longest lasts"
    ) as caught:
        tvit_cli.train(**inputs, working_directory=tmp_path, clip_seconds=60)
    assert caught.value.exit_code == 2 and "Take at most --clip-seconds" in str(caught.value)


def test_a_store_that_cannot_serve_names_the_command_that_makes_one(inputs, tmp_path):
    data = shutil.copytree(inputs["path_to_data"], tmp_path / "data")
    tvit_cli.extract(path_to_data=data, frames_per_video=4, num_workers=0)
    how = {**inputs, "path_to_data": str(data), "working_directory": tmp_path / "runs", "epochs": 1}
    how |= {"n_frames": 2, "clip_seconds": 0.2, "num_workers": 0, "device": "cpu"}
    notes = []
    tvit_cli.train(**how, dry_run=True, on_event=lambda event: notes.append(getattr(event, "text", "")))
    (text,) = [note for note in notes if "not used" in note]
    assert "--fps 20" in text and "--overwrite" in text
    command = text.split("`")[1].split()
    tvit_cli.extract(
        path_to_data=command[command.index("--path-to-data") + 1], fps=20, overwrite=True, num_workers=0
    )
    notes.clear()
    result = tvit_cli.train(**how, on_event=lambda event: notes.append(getattr(event, "text", "")))
    assert any("Frames are read from" in note and "20 frames per second" in note for note in notes)
    card = tvit_cli.load_model(result.model).card
    assert card.preprocessing.clip_seconds == 0.2
    shutil.rmtree(data / "frames")
    events = []
    how = {"model": result.model, "path_to_data": str(data), "subset": "val", "on_event": events.append}
    by_video = tvit_cli.evaluate(**how).answers
    tvit_cli.extract(path_to_data=data, fps=20, num_workers=0)
    by_store = tvit_cli.evaluate(**how).answers
    assert any("Frames are read from" in getattr(event, "text", "") for event in events)
    for one, other in zip(by_video, by_store, strict=True):
        assert np.allclose(one.scores, other.scores, atol=0.02)  # JPEG


def test_weights_bring_the_seconds_of_their_training(tmp_path):
    def own(name, n_frames=None, **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return own_clips(str(folder), n_frames).get("clip_seconds")

    assert own("videomae", model_type="videomae") == pytest.approx(64 / 30)
    assert own("videomae", 8, model_type="videomae") == pytest.approx(64 / 30)  # positions are interpolated
    assert own("videomae-ssv2", model_type="videomae") is None
    assert own("vjepa2", model_type="vjepa2") == 16
    assert own("vjepa2", 16, model_type="vjepa2") == 4  # positions count frames
    assert own("vivit", model_type="vivit") == 2.56
    assert own("vit", model_type="vit") is None
    name = {"hf_model_name": str(tmp_path / "vjepa2")}
    beside = [
        load(TrainSettings, flags={**name, **given}, beneath=settings_beneath)
        for given in ({}, {"frame_grid": 64})
    ]
    assert [loaded.settings.clip_seconds for loaded in beside] == [
        16,
        None,
    ]  # of a grid, frames are no seconds


def test_seconds_of_weights_give_way_to_shorter_videos(inputs):
    notes = []
    clip = ClipFormat(4, 16, None, 30.0, by_weights=True)
    choice = split_choice(tiny.settings(**inputs))
    report = lambda event: notes.append(getattr(event, "text", ""))  # noqa: E731
    found = open_dataset(inputs["path_to_data"], report, clip=clip, **choice)
    assert found.clip_seconds is None
    assert any("30 s are longer than every video" in note for note in notes)
