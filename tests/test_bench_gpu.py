"""The GPU benchmark, run on a CPU at its smallest size."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent / "bench"


def test_every_part_of_it_runs_on_a_cpu(tmp_path):
    small = "--device cpu --precision no --width 64 --depth 1 --size 32 --schemes joint,space --frames 2 --batch 2"
    command = [
        sys.executable, str(BENCH), "gpu", "--json", str(tmp_path / "found.jsonl"), "--", *small.split(),
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "--rounds", "1", "--clips", "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.jsonl").read_text())["results"]
    for scheme in ("joint", "space"):
        row = found[f"{scheme}, 2 frames"]
        assert row["clips_per_second"] > 0
        assert row["gigaflops_per_clip"] > 0
        assert 0 < row["of_matmul_rate"] < 1
    assert found["augmentation, 2 frames"]["clips_per_second"] > 0
    fed = found["joint, 2 frames, from a frame store"]
    assert fed["clips_per_second"] > 0
    assert 0 <= fed["data_wait"] < 1
