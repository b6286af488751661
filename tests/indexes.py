"""Frame stores that hold an index of any size, and no frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tvit_cli.data.framestore_format import (
    CLIP,
    NO_GROUP,
    Header,
    Parameters,
    make_table,
    write_header,
    write_table,
)


def synthetic_index(folder: Path, clips: int) -> None:
    """A store without frames whose index lists so many clips under names as Kinetics has them."""
    write_header(folder, Header(Parameters(frames_per_video=8, quality=90, short_side=256), "data"))
    keys = [b"train/playing squash or racquetball/%011d_000012_000022.mp4" % n for n in range(clips)]
    facts = {"labels": ["a"], "groups": [], "shards": [], "unreadable": {}}
    table = np.zeros(clips, CLIP)
    table["group"] = NO_GROUP
    with (folder / "index.frames").open("wb") as file:
        write_table(file, make_table(facts, table, keys))
