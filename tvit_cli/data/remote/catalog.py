"""Facts on known data sets: where their archives are, how large, what hash, what lies in them.

`bytes` and `sha256` are None where nobody has published them; what was received is then recorded.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tvit_cli.data.remote.archive import ArchiveKind
from tvit_cli.data.remote.http import file_name
from tvit_cli.errors import SettingsError

# How members map to `videos/<Class>/<file>`; see `data.remote.placement`.
Layout = Literal["ucf101", "class folders", "subset folders", "one class", "lists"]


@dataclass(frozen=True)
class Source:
    """One archive, and the addresses that serve the very same bytes."""

    urls: tuple[str, ...]
    kind: ArchiveKind
    layout: Layout
    bytes: int | None = None
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """The archive's name on disk: that of its first address."""
        return file_name(self.urls[0])


@dataclass(frozen=True)
class Part:
    """A piece of a data set; `sources` are alternatives, best first. One of several is named by its class."""

    name: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Dataset:
    """Counts for people, parts for `tvit download`; a set without `videos` is made, not downloaded."""

    name: str
    title: str
    classes: int
    clips: int
    licence: str
    homepage: str
    videos: tuple[Part, ...] = ()
    splits: tuple[Part, ...] = ()
    # Groups of the test side of each official split, where the lists follow from them; see `data.splits`.
    test_groups: tuple[tuple[int, int], ...] = ()
    unpacked_bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        """What is downloaded from the first source of each part; None where that is not known."""
        sizes = [part.sources[0].bytes for part in self.videos + self.splits]
        return sum(size for size in sizes if size is not None) if sizes and None not in sizes else None


_CRCV: Final = "https://www.crcv.ucf.edu"
_WEIZMANN: Final = "https://www.wisdom.weizmann.ac.il/~vision/VideoAnalysis/Demos/SpaceTimeActions"
_WEIZMANN_CLASSES: Final = ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")

CATALOG: Final[tuple[Dataset, ...]] = (
    Dataset(
        name="ucf101",
        title="UCF101: 101 actions from web videos",
        classes=101,
        clips=13_320,
        licence="none stated; for research, see its home page",
        homepage=f"{_CRCV}/data/UCF101.php",
        videos=(
            Part(
                "videos",
                (
                    Source(  # size and hash as in TensorFlow Datasets
                        urls=("https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",),
                        kind="zip",
                        layout="ucf101",
                        bytes=6_960_400_115,
                        sha256="dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d",
                    ),
                    Source(
                        urls=(
                            f"{_CRCV}/data/UCF101/UCF101.rar",
                            f"{_CRCV}/datasets/human-actions/ucf101/UCF101.rar",
                        ),
                        kind="rar",
                        layout="ucf101",
                        bytes=6_932_971_618,
                        sha256="ca8dfadb4c891cb11316f94d52b6b0ac2a11994e67a0cae227180cd160bd8e55",
                    ),
                ),
            ),
        ),
        splits=(
            Part(
                "splits",
                (
                    Source(
                        urls=(f"{_CRCV}/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",),
                        kind="zip",
                        layout="lists",
                        bytes=113_943,
                        sha256="5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27",
                    ),
                ),
            ),
        ),
        test_groups=((1, 7), (8, 14), (15, 21)),
        unpacked_bytes=7_000_000_000,
    ),
    Dataset(
        name="ucf101-subset",
        title="UCF101, 10 classes in train, val and test",
        classes=10,
        clips=405,
        licence="as UCF101",
        homepage="https://huggingface.co/datasets/sayakpaul/ucf101-subset",
        videos=(
            Part(
                "videos",
                (
                    Source(  # a plain tar in truth; the hash is the hub's
                        urls=(
                            "https://huggingface.co/datasets/sayakpaul/ucf101-subset/resolve/main/UCF101_subset.tar.gz",
                        ),
                        kind="tar",
                        layout="subset folders",
                        sha256="e9fcc76af48d320be88c5265f2e0576ecd615956976f6ce4742fdf2b042b71eb",
                    ),
                ),
            ),
        ),
        unpacked_bytes=171_000_000,
    ),
    Dataset(
        name="weizmann",
        title="Weizmann: 10 actions of 9 people before a still wall",
        classes=10,
        clips=90,
        licence="published for research (Gorelick et al. 2005)",
        homepage=f"{_WEIZMANN}.html",
        videos=tuple(
            Part(name, (Source(urls=(f"{_WEIZMANN}/DB/{name}.zip",), kind="zip", layout="one class"),))
            for name in _WEIZMANN_CLASSES
        ),
    ),
    Dataset(
        name="motions",
        title="motions: tvit's demo, made on this machine; its classes are told apart by motion alone",
        classes=8,
        clips=1_600,
        licence="made by tvit, free of terms",
        homepage="",
    ),
)


def find(name: str, catalog: Sequence[Dataset] = CATALOG) -> Dataset:
    """The data set of this name, case set aside. Raises SettingsError with near names."""
    by_name = {dataset.name: dataset for dataset in catalog}
    if (found := by_name.get(name.casefold())) is not None:
        return found
    near = difflib.get_close_matches(name.casefold(), by_name, n=3, cutoff=0.5)
    known = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(by_name)}."
    raise SettingsError(
        f"{name}: no data set of this name is known. {known} `tvit download --list` shows them."
    )
