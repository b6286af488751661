"""Frame stores: of videos, or a synthetic index without frames."""

from pathlib import Path

import numpy as np

from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.framestore_format import (
    CLIP,
    NO_GROUP,
    Header,
    Parameters,
    make_table,
    write_header,
    write_table,
)
from tvit_cli.data.framestore_writer import ShardWriter, pack_video, write_index
from tvit_cli.data.layout import Layout, Video

PARAMETERS = Parameters(frames_per_video=8, quality=90, short_side=256)
LABELS = ("run", "walk")


def write_synthetic_index(folder: Path, clips: int) -> None:
    """A store without frames whose index lists so many clips under names as Kinetics has them."""
    write_header(folder, Header(Parameters(frames_per_video=8, quality=90, short_side=256), "data"))
    keys = [b"train/playing squash or racquetball/%011d_000012_000022.mp4" % n for n in range(clips)]
    facts = {"labels": ["a"], "groups": [], "shards": [], "unreadable": {}}
    table = np.zeros(clips, CLIP)
    table["group"] = NO_GROUP
    with (folder / "index.frames").open("wb") as file:
        write_table(file, make_table(facts, table, keys))


def make_store(
    folder: Path, videos: list[Video], *, shard_bytes: int = 1 << 20, **changes: int
) -> FrameStore:
    """Writes a complete store of the videos."""
    parameters = Parameters(**{**{k: getattr(PARAMETERS, k) for k in PARAMETERS.__slots__}, **changes})
    write_header(folder, Header(parameters, str(folder.parent)))
    with ShardWriter(folder, rank=0, shard_bytes=shard_bytes) as writer:
        for video in videos:
            writer.add(video.name, pack_video(video.path, parameters))
    write_index(folder, Layout(folder.parent, LABELS, tuple(videos), ()), {})
    return FrameStore(folder)
