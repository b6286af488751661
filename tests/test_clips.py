"""Frame sampling, the data set of clips, prefetch by threads and processes."""

import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entry import start
from stores import LABELS, make_store
from tiny import make_clips, make_pretrained

from tvit_cli import cli
from tvit_cli.data import clips
from tvit_cli.data.clips import ClipDataset, ClipItem, collate, load_batches, worker_errors
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.framestore_writer import shard_paths
from tvit_cli.data.layout import Video
from tvit_cli.errors import DataError, RunError
from tvit_cli.portable.reading import segment_indices

FRAMES = 40


@pytest.fixture(scope="module")
def videos(make_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [
        Video(make_video(folder / f"{n}.avi", frames=FRAMES), f"{n}.avi", LABELS[n % 2], "train", None)
        for n in range(4)
    ]


def dataset(videos, **how):
    return ClipDataset(
        videos, LABELS, **({"n_frames": 8, "short_side": 24, "seed": 0, "training": True} | how)
    )


@pytest.fixture(scope="session")
def numbers(read_numbers):
    return lambda frames: read_numbers(frames.permute(0, 2, 3, 1).numpy())


Numbers = Callable[[torch.Tensor], list[int]]


def test_an_item_is_uint8_frames_of_a_dataset_that_can_be_pickled(videos):
    item = dataset(videos)[(3, 1)]
    assert item.frames.shape == (8, 3, 24, 32)
    assert item.frames.dtype == torch.uint8
    assert item.frames.is_contiguous(memory_format=torch.channels_last)
    assert (item.label, item.epoch, item.index, item.weight, item.error) == (1, 3, 1, 1.0, "")
    data = dataset(videos)
    assert torch.equal(pickle.loads(pickle.dumps(data))[(1, 2)].frames, data[(1, 2)].frames)
    assert len(data) == 4


def test_evaluation_takes_centres_and_training_draws_within_segments(videos, numbers):
    data = dataset(videos, training=False)
    assert numbers(data[(0, 2)].frames) == segment_indices(FRAMES, 8)
    assert torch.equal(data[(0, 2)].frames, data[(7, 2)].frames)
    data = dataset(videos)
    drawn = np.array([numbers(data[(epoch, 0)].frames) for epoch in range(30)])
    assert (drawn // 5 == np.arange(8)).all()
    assert all(len(set(column)) == 5 for column in drawn.T)  # every frame has its turn


def test_the_draw_depends_on_seed_epoch_and_index_alone(videos, numbers):
    def draw(seed, epoch, index):
        return tuple(numbers(dataset(videos, seed=seed)[(epoch, index)].frames))

    keys = [(s, e, i) for s in range(2) for e in range(2) for i in range(2)]
    first = {key: draw(*key) for key in keys}
    assert len(set(first.values())) == len(keys)
    np.random.seed(1)
    torch.manual_seed(1)
    assert {key: draw(*key) for key in reversed(keys)} == first


def test_shuffled_frames_are_the_same_frames_in_an_order_of_their_own(videos, numbers):
    plain, shuffled = (dataset(videos, training=False, shuffle_frames=on) for on in (False, True))
    orders = [numbers(shuffled[(0, index)].frames) for index in range(4)]
    for index, order in enumerate(orders):
        assert sorted(order) == numbers(plain[(0, index)].frames)
        assert order != sorted(order)
        assert order == numbers(shuffled[(5, index)].frames)
    assert len({tuple(order) for order in orders}) == 4


def test_an_unreadable_video_becomes_black_frames_of_no_weight(videos, tmp_path):
    (tmp_path / "text.avi").write_text("text")
    bad = Video(tmp_path / "text.avi", "text.avi", "walk", "train", None)
    item = dataset([videos[0], bad])[(0, 1)]
    assert item.frames.shape == (8, 3, 24, 24)
    assert not item.frames.any()
    assert (item.label, item.weight) == (1, 0.0)
    assert item.error.startswith("not a video")
    batch = collate([dataset([videos[0], bad])[(0, index)] for index in (0, 1)])
    assert batch.weights.tolist() == [1, 0]
    assert [index for index, _ in batch.errors] == [1]


def test_the_exact_count_is_remembered_after_the_first_read(videos, monkeypatch):
    asked = []
    read = clips.read_clip

    def spy(*args, known, **how):
        asked.append(getattr(known, "count", known))
        return read(*args, known=known, **how)

    monkeypatch.setattr(clips, "read_clip", spy)
    data = dataset(videos)
    for key in [(0, 0), (0, 1), (1, 0), (2, 0)]:
        data[key]
    assert asked == [None, None, FRAMES, FRAMES]
    assert torch.equal(data[(2, 0)].frames, dataset(videos)[(2, 0)].frames)


def test_a_batch_keeps_each_clip_in_its_size_and_is_pinned_whole(make_video, tmp_path, videos, monkeypatch):
    paths = [make_video(tmp_path / "wide.avi"), make_video(tmp_path / "tall.avi", height=64, width=48)]
    data = dataset([Video(path, path.name, "run", "train", None) for path in paths])
    batch = collate([data[(2, 0)], data[(2, 1)]])
    assert [tuple(clip.shape) for clip in batch.clips] == [(8, 3, 24, 32), (8, 3, 32, 24)]
    assert batch.epochs.tolist() == [2, 2]
    assert batch.indices.tolist() == [0, 1]
    assert (batch.labels.dtype, batch.weights.dtype) == (torch.int64, torch.float32)
    assert batch.errors == []
    batch = collate([dataset(videos)[(0, index)] for index in range(2)])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)
    pinned = batch.pin_memory()
    for name in ("labels", "epochs", "indices", "weights"):
        assert torch.equal(getattr(pinned, name), getattr(batch, name))
        assert getattr(pinned, name) is not getattr(batch, name)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(pinned.clips, batch.clips, strict=True))
    assert pinned.errors == batch.errors


def test_worker_processes_give_the_same_clips_as_none(videos):
    keys = [[(epoch, index) for index in range(4)] for epoch in range(2)]

    def run(workers):
        return list(load_batches(dataset(videos), keys, workers=workers))

    for here, there in zip(run(0), run(1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here.clips, there.clips, strict=True))
        assert torch.equal(here.labels, there.labels)
        assert all(clip.is_contiguous(memory_format=torch.channels_last) for clip in there.clips)


UNGUARDED = """
import json, multiprocessing, os, pathlib, sys, time, torch
from tvit_cli.data.clips import ClipDataset, load_batches
from tvit_cli.data.layout import Video

def forked():
    raise RuntimeError("forked")

torch.cuda.is_initialized = lambda: True
os.register_at_fork(before=forked)  # raises no error, but is printed
video = Video(pathlib.Path(sys.argv[1]), "0.avi", "A", "train", None)
data = ClipDataset([video], ["A"], n_frames=2, short_side=24, seed=0, training=True)
batches = load_batches(data, [[(epoch, 0)] for epoch in range(8)], workers=2)
same = torch.equal(next(batches).clips[0], data[0, 0].frames)
print(json.dumps([same, *[worker.pid for worker in multiprocessing.active_children()]]), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_workers_beside_cuda_are_not_forked_and_end_with_their_parent(videos, tmp_path):
    """The main script, without a guard, must not run again in a worker; a killed parent ends none itself."""
    (tmp_path / "program.py").write_text(UNGUARDED)
    with start(tmp_path / "program.py", videos[0].path) as child:
        same, *pids = json.loads(child.stdout.readline())
        child.kill()
        errors = child.communicate(timeout=60)[1]
    assert same and len(pids) == 2 and "forked" not in errors, errors
    until = time.monotonic() + 20
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < until, alive
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout[:1] != b"Z"


def test_segments_are_taken_at_centres_offsets_and_the_last_frame():
    assert segment_indices(8, 4) == [1, 3, 5, 7]
    assert segment_indices(90, 3) == [15, 45, 75]
    assert segment_indices(8, 8) == list(range(8))
    assert segment_indices(8, 8, [0.999] * 8) == list(range(8))
    assert segment_indices(3, 5) == [0, 1, 2, 2, 2]
    assert segment_indices(1, 4, [0.9, 0.1, 0.5, 0.0]) == [0, 0, 0, 0]
    assert segment_indices(100, 4, [0.0] * 4)[0] == 0
    assert segment_indices(100, 4, [math.nextafter(1.0, 0.0)] * 4)[-1] == 99


@pytest.mark.parametrize("frame_count", [9, 17, 64, 301])
def test_each_frame_stays_in_its_segment_and_in_time_order(frame_count):
    n_frames = 8
    for at in (0.0, 0.25, 0.5, math.nextafter(1.0, 0.0)):
        indices = segment_indices(frame_count, n_frames, [at] * n_frames)
        assert indices == sorted(indices)
        for segment, index in enumerate(indices):
            start, end = segment * frame_count / n_frames, (segment + 1) * frame_count / n_frames
            assert math.floor(start) <= index < math.ceil(end)


@pytest.mark.parametrize(
    ("frame_count", "n_frames", "offsets"),
    [(0, 8, None), (8, 0, None), (8, 2, [0.5]), (8, 2, [0.5, 1.0]), (8, 2, [-0.1, 0.5])],
)
def test_what_has_no_answer_is_refused(frame_count, n_frames, offsets):
    with pytest.raises(ValueError, match=r"frames cannot be chosen|offsets in"):
        segment_indices(frame_count, n_frames, offsets)


KEYS = [[(epoch, i), (epoch, (i + 1) % 4)] for epoch in range(3) for i in range(4)]


@pytest.fixture(scope="module")
def longer_videos(make_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [
        Video(make_video(folder / f"{n}.avi", frames=30 + n), f"{n}.avi", LABELS[n % 2], "train", None)
        for n in range(4)
    ]


@pytest.fixture
def store(longer_videos, tmp_path):
    return make_store(tmp_path / "frames", longer_videos, shard_bytes=20_000)


def drawn(longer_videos, store=None):
    return ClipDataset(longer_videos, LABELS, n_frames=8, short_side=24, seed=0, training=True, store=store)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.clips, b.clips, strict=True)) and torch.equal(
        a.indices, b.indices
    )


def readers():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clips")]


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_the_batches_of_a_store_in_their_order(workers, longer_videos, store, monkeypatch):
    # the most they can disturb each other
    monkeypatch.setattr("tvit_cli.data.framestore.MOST_OPEN_SHARDS", 1)
    store = FrameStore(store.folder)
    assert len(shard_paths(store.folder)) > 1
    alone = list(load_batches(drawn(longer_videos, store), KEYS, workers=0))
    assert [batch.indices.tolist() for batch in alone] == [[i for _, i in keys] for keys in KEYS]
    together = list(load_batches(drawn(longer_videos, store), KEYS, workers=workers))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert not readers()


def test_processes_give_the_batches_of_videos_in_their_order(longer_videos):
    alone = list(load_batches(drawn(longer_videos), KEYS, workers=0))
    together = list(load_batches(drawn(longer_videos), KEYS, workers=1))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


class Counting(ClipDataset):
    """Counts how many clips were read."""

    read = 0

    def __getitem__(self, key: Any) -> ClipItem:
        Counting.read += 1
        return super().__getitem__(key)


def test_prefetch_threads_respect_their_limit_and_end_unread(longer_videos, store):
    data = Counting(longer_videos, LABELS, n_frames=2, short_side=24, seed=0, training=True, store=store)
    taken = []

    def keys():
        for number in range(1_000):
            taken.append(number)
            yield [(number, 0)]

    Counting.read = 0
    batches = load_batches(data, keys(), workers=2)
    next(batches)
    deadline = time.monotonic() + 30
    while Counting.read < len(taken) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (len(taken), Counting.read) == (4, 4)
    assert readers()
    batches.close()  # type: ignore[attr-defined]
    assert not readers()
    assert len(taken) == 4


def test_what_goes_wrong_in_a_thread_is_said_to_the_one_who_asked(longer_videos, store):
    for shard in shard_paths(store.folder):
        shard.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        list(load_batches(drawn(longer_videos, store), KEYS, workers=2))
    assert not readers()


class Dying(ClipDataset):
    """Takes its process down, as a decoder that crashes would."""

    def __getitem__(self, key: Any) -> ClipItem:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_dies_is_an_error_that_says_how_to_go_on(longer_videos):
    data = Dying(longer_videos, LABELS, n_frames=2, short_side=24, seed=0, training=True)
    died = r"process that decodes videos died.*--resume-from-checkpoint latest"
    with pytest.raises(RunError, match=died), worker_errors(resumes=True):
        list(load_batches(data, KEYS, workers=1))


class Crashing(ClipDataset):
    """Its third video crashes the decoder."""

    def __getitem__(self, key: Any) -> ClipItem:
        if key[1] == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__getitem__(key)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_video_that_crashes_its_decoder_is_unreadable_alone(longer_videos):
    keys = [[(0, 0), (0, 1)], [(0, 3), (0, 2)], [(0, 1)], [(1, 0)], [(1, 3)], [(1, 1), (1, 3)]]
    alone = list(load_batches(drawn(longer_videos), keys, workers=0))
    data = Crashing(longer_videos, LABELS, n_frames=8, short_side=24, seed=0, training=True)
    together = list(load_batches(data, keys, workers=1, survives=True))
    assert [batch.indices.tolist() for batch in together] == [[index for _, index in key] for key in keys]
    assert all(same(a, b) for n, (a, b) in enumerate(zip(alone, together, strict=True)) if n != 1)
    assert torch.equal(together[1].clips[0], alone[1].clips[0]) and together[1].weights.tolist() == [1, 0]
    ((index, reason),) = [error for batch in together for error in batch.errors]
    assert index == 2 and "decodes it died." in reason


def test_batches_become_files_where_shared_memory_is_little(longer_videos, monkeypatch, tmp_path):
    monkeypatch.setattr(clips, "_free_shared_memory", lambda: 1000.0)
    monkeypatch.setattr(torch.Tensor, "share_memory_", None)  # not even tried
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alone = list(load_batches(drawn(longer_videos), KEYS, workers=0))
    batches = load_batches(drawn(longer_videos), KEYS, workers=2)
    first = next(batches)
    assert list(tmp_path.glob("tvit-*"))
    assert all(same(a, b) for a, b in zip(alone, [first, *batches], strict=True))
    assert not list(tmp_path.iterdir())


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Failing(ClipDataset):
    """Its clips cannot be read (memory), or read and not sent (space)."""

    how = "send"

    def __getitem__(self, key: Any) -> ClipItem:
        if self.how == "read":
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        item = super().__getitem__(key)
        object.__setattr__(item, "error", Words("x"))
        return item


class Words(str):
    """A reason that a worker's queue cannot send."""

    __reduce_ex__ = no_space


FAILED = (
    r"process that decodes videos failed: .*(No space|Cannot allocate).*--num-workers.*extract.*--shm-size"
)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["send", "read"])
def test_a_worker_that_fails_is_an_error_with_advice(longer_videos, monkeypatch, how):
    monkeypatch.setattr(Failing, "how", how)
    data = Failing(longer_videos, LABELS, n_frames=2, short_side=24, seed=0, training=True)
    with pytest.raises(RunError, match=FAILED), worker_errors():
        list(load_batches(data, KEYS, workers=2))


class Hanging(ClipDataset):
    """Never gives a clip."""

    def __getitem__(self, key: Any) -> ClipItem:
        while True:
            time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_do_not_end_are_killed(longer_videos, monkeypatch):
    monkeypatch.setattr(clips, "_SECONDS_TO_END", 0.2)
    before = signal.signal(signal.SIGALRM, lambda number, frame: no_space())
    data = Hanging(longer_videos, LABELS, n_frames=2, short_side=24, seed=0, training=True)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(OSError, match="No space"):
            list(load_batches(data, KEYS, workers=2))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not clips.multiprocessing.active_children()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command line of each verb that reads videos with worker processes; the model is trained."""
    root = tmp_path_factory.mktemp("verbs")
    clips = make_clips(root / "clips", groups=12)
    train = ["train", "--path-to-data", str(clips), "--hf-model-name", str(make_pretrained(root / "pre"))]
    train += ["--img-size", "32", "--n-frames", "4", "--epochs", "1", "--per-gpu-batch-size", "4"]
    train += ["--device", "cpu", "--working-directory", str(root / "runs"), "--num-workers"]
    with pytest.raises(SystemExit) as ended:
        cli.run([*train, "0", "--experiment-name", "model"])
    assert not ended.value.code
    model = ["--model", str(root / "runs" / "model"), "--device", "cpu"]
    return {
        "train": [*train, "2", "--experiment-name", "other"],
        "eval": ["eval", *model, "--num-workers", "2"],
        "predict": ["predict", str(clips), *model],
    }


@pytest.mark.parametrize("verb", ["train", "eval", "predict"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_verbs_say_that_a_worker_failed(words, verb, monkeypatch, capsys):
    monkeypatch.setattr(clips, "collate", no_space)
    monkeypatch.setattr("tvit_cli.engine.predict.model.default_worker_count", lambda: 2)
    with pytest.raises(SystemExit) as ended:
        cli.run(words[verb])
    errors = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and "decodes videos failed" in errors and "--shm-size" in errors


def test_a_connection_that_a_dying_decoder_resets_is_its_death():
    def cut():
        yield 1
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(RuntimeError, match=r"^DataLoader worker ended while it sent a batch"):
        list(clips._received(cut()))


@pytest.mark.parametrize("verb", ["eval", "predict"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_one_crash_of_a_decoder_loses_no_other_result(words, verb, monkeypatch, capsys):
    main, really = os.getpid(), clips.read_clip
    card = json.loads((Path(words["eval"][2]) / "model" / "card.json").read_text())
    crashes = f"v_Red_g{card['held_out']['val'][0]}_c01.avi"

    def crash(path, *arguments, **keywords):
        if path.name == crashes and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGSEGV)
        return really(path, *arguments, **keywords)

    monkeypatch.setattr(clips, "read_clip", crash)
    monkeypatch.setattr("tvit_cli.engine.predict.model.default_worker_count", lambda: 2)
    with pytest.raises(SystemExit):
        cli.run([*words[verb], *(["--subset", "val"] if verb == "eval" else ["--csv"])])
    shown = capsys.readouterr()
    errors = " ".join(shown.err.split())
    assert f"{crashes}: the process that decodes it died." in errors
    assert "resume" not in errors and "Blue" in shown.out and "Green" in shown.out


HANG = """
import sys, time
from tvit_cli import cli
from tvit_cli.data import clips
from tvit_cli.engine import launch, predict
launch.SECONDS_TO_GET_BATCH = clips._SECONDS_TO_END = 0.2
predict.default_worker_count = lambda: 2
def hang(items):
    print("hangs", flush=True)
    while True:
        time.sleep(60)
clips.collate = hang
cli.run(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("verb", "name", "code"),
    [
        ("train", "SIGTERM", 143),
        ("train", "SIGINT", 130),
        ("eval", "SIGTERM", 143),
        ("predict", "SIGINT", 130),
    ],
)
def test_a_signal_ends_the_wait_for_a_batch(words, verb, name, code):
    child = start("-c", HANG, *words[verb])
    try:
        assert child.stdout is not None
        while (line := child.stdout.readline()) and "hangs" not in line:
            pass
        assert line
        child.send_signal(getattr(signal, name))
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("verb", ["train", "predict"])
def test_verbs_end_well_with_a_small_shared_memory(words, verb):
    """In a mount namespace of its own."""
    small = "mount -t tmpfs -o size=128k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{small} && exec "$@"', "sh", sys.executable, "-m", "tvit_cli",
         *words[verb], *(["--experiment-name", "small"] if verb == "train" else [])],
        env=environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
