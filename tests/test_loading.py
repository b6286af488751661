"""Prefetch of batches by threads and processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from entry import start
from stores import LABELS, make_store
from tiny import make_clips, make_pretrained

from tvit_cli import cli
from tvit_cli.data import clips
from tvit_cli.data.clips import ClipDataset, ClipItem, load_batches, worker_errors
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.framestore_writer import shard_paths
from tvit_cli.data.layout import Video
from tvit_cli.errors import DataError, RunError

KEYS = [[(epoch, i), (epoch, (i + 1) % 4)] for epoch in range(3) for i in range(4)]


@pytest.fixture(scope="module")
def videos(make_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [
        Video(make_video(folder / f"{n}.avi", frames=30 + n), f"{n}.avi", LABELS[n % 2], "train", None)
        for n in range(4)
    ]


@pytest.fixture
def store(videos, tmp_path):
    return make_store(tmp_path / "frames", videos, shard_bytes=20_000)


def dataset(videos, store=None):
    return ClipDataset(videos, LABELS, n_frames=8, short_side=24, seed=0, training=True, store=store)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.clips, b.clips, strict=True)) and torch.equal(
        a.indices, b.indices
    )


def readers():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clips")]


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_the_batches_of_a_store_in_their_order(workers, videos, store, monkeypatch):
    # the most they can disturb each other
    monkeypatch.setattr("tvit_cli.data.framestore.MOST_OPEN_SHARDS", 1)
    store = FrameStore(store.folder)
    assert len(shard_paths(store.folder)) > 1
    alone = list(load_batches(dataset(videos, store), KEYS, workers=0))
    assert [batch.indices.tolist() for batch in alone] == [[i for _, i in keys] for keys in KEYS]
    together = list(load_batches(dataset(videos, store), KEYS, workers=workers))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert not readers()


def test_processes_give_the_batches_of_videos_in_their_order(videos):
    alone = list(load_batches(dataset(videos), KEYS, workers=0))
    together = list(load_batches(dataset(videos), KEYS, workers=1))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


class Counting(ClipDataset):
    """Counts how many clips were read."""

    read = 0

    def __getitem__(self, key: Any) -> ClipItem:
        Counting.read += 1
        return super().__getitem__(key)


def test_prefetch_threads_respect_their_limit_and_end_unread(videos, store):
    data = Counting(videos, LABELS, n_frames=2, short_side=24, seed=0, training=True, store=store)
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


def test_what_goes_wrong_in_a_thread_is_said_to_the_one_who_asked(videos, store):
    for shard in shard_paths(store.folder):
        shard.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        list(load_batches(dataset(videos, store), KEYS, workers=2))
    assert not readers()


class Dying(ClipDataset):
    """Takes its process down, as a decoder that crashes would."""

    def __getitem__(self, key: Any) -> ClipItem:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_dies_is_an_error_that_says_how_to_go_on(videos):
    data = Dying(videos, LABELS, n_frames=2, short_side=24, seed=0, training=True)
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
def test_a_video_that_crashes_its_decoder_is_unreadable_alone(videos):
    keys = [[(0, 0), (0, 1)], [(0, 3), (0, 2)], [(0, 1)], [(1, 0)], [(1, 3)], [(1, 1), (1, 3)]]
    alone = list(load_batches(dataset(videos), keys, workers=0))
    data = Crashing(videos, LABELS, n_frames=8, short_side=24, seed=0, training=True)
    together = list(load_batches(data, keys, workers=1, survives=True))
    assert [batch.indices.tolist() for batch in together] == [[index for _, index in key] for key in keys]
    assert all(same(a, b) for n, (a, b) in enumerate(zip(alone, together, strict=True)) if n != 1)
    assert torch.equal(together[1].clips[0], alone[1].clips[0]) and together[1].weights.tolist() == [1, 0]
    ((index, reason),) = [error for batch in together for error in batch.errors]
    assert index == 2 and "decodes it died." in reason


def test_batches_become_files_where_shared_memory_is_little(videos, monkeypatch, tmp_path):
    monkeypatch.setattr(clips, "_free_shared_memory", lambda: 1000.0)
    monkeypatch.setattr(torch.Tensor, "share_memory_", None)  # not even tried
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alone = list(load_batches(dataset(videos), KEYS, workers=0))
    batches = load_batches(dataset(videos), KEYS, workers=2)
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
def test_a_worker_that_fails_is_an_error_with_advice(videos, monkeypatch, how):
    monkeypatch.setattr(Failing, "how", how)
    data = Failing(videos, LABELS, n_frames=2, short_side=24, seed=0, training=True)
    with pytest.raises(RunError, match=FAILED), worker_errors():
        list(load_batches(data, KEYS, workers=2))


class Hanging(ClipDataset):
    """Never gives a clip."""

    def __getitem__(self, key: Any) -> ClipItem:
        while True:
            time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_do_not_end_are_killed(videos, monkeypatch):
    monkeypatch.setattr(clips, "_SECONDS_TO_END", 0.2)
    before = signal.signal(signal.SIGALRM, lambda number, frame: no_space())
    data = Hanging(videos, LABELS, n_frames=2, short_side=24, seed=0, training=True)
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
    monkeypatch.setattr("tvit_cli.engine.predict.default_worker_count", lambda: 2)
    with pytest.raises(SystemExit) as ended:
        cli.run(words[verb])
    errors = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and "decodes videos failed" in errors and "--shm-size" in errors


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
    monkeypatch.setattr("tvit_cli.engine.predict.default_worker_count", lambda: 2)
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
