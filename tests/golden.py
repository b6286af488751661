"""Golden values: short trainings, evaluations and predictions, measured by command line on one thread.

The exact values, to compare two versions of the code bit for bit on one machine:

    python tests/golden.py before.json
    python tests/golden.py after.json && cmp before.json after.json

After a deliberate change of the numbers, regenerate what tests/test_golden.py compares with a tolerance:

    python tests/golden.py --commit
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    for name in [name for name in os.environ if name.startswith("TVIT_")]:
        del os.environ[name]

from entry import tvit
from safetensors.torch import load_file
from tiny import make_clips, make_pretrained

COMMITTED = Path(__file__).parent / "frozen" / "golden.json"
CLOCKS = ("seconds", "clips_per_second", "data_wait")
EVALUATED = ("subset", "val_groups", "test_groups", "views", "metrics", "intervals", "per_class", "confused")
_COMMON = "--path-to-data DATA --device cpu --num-workers 0 --val-groups 1 --test-groups 1 --top-k 2"
_TINY = "--hf-model-name vit --img-size 32 --n-frames 4 --per-gpu-batch-size 4 --learning-rate 0.01"
RUNS = {
    "quickstart": "--preset quickstart --per-gpu-batch-size 6 --epochs 3 --warmup-epochs 1",
    "lora": f"{_TINY} --epochs 3 --attention divided --lora-rank 4 --lora-dropout 0.1",
    "regularised": (
        f"{_TINY} --epochs 2 --attention factorized --train all --randaugment 2 --mixup 0.2 --cutmix 0.5 "
        "--random-erasing 0.25 --label-smoothing 0.1 --ema-decay 0.9 --layer-decay 0.8 --drop-path 0.1 "
        "--gradient-accumulation-steps 2 --balanced-sampling --max-grad-norm 1"
    ),
    "store": (
        f"{_TINY} --epochs 2 --attention joint --lora-rank 2 --lora-use-dora --lora-bias all --feature-norm "
        "--tubelet-size 2 --repeats 2 --class-weights balanced"
    ),
}


def measure() -> dict[str, Any]:
    """Trains, evaluates and predicts below a temporary folder; {"numbers": of each run, "sha256": of each file}."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for path in make_clips(Path("colours")).rglob("*.avi"):
            os.utime(path, (1_000_000_000, 1_000_000_000))  # a frame store records them
        make_pretrained(Path("vit"))
        _run(
            "extract",
            *[
                "--path-to-data", "colours", "--output", "store", "--short-side", "40", "--frames-per-video",
                "6",
            ],
        )  # fmt: skip
        numbers = {name: _measure_run(name) for name in RUNS}
        hashes = {}
        for pattern in (
            "colours/*/*.avi",
            "store/*.frames",
            "runs/*/eval/*/*.csv",
            "runs/*/val_per_class.jsonl",
        ):
            for path in Path().glob(pattern):
                hashes[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path("runs").rglob("*.safetensors"):
            hashes[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            hashes[f"{path}, tensors"] = _tensors_hash(path)
    return {"numbers": numbers, "sha256": dict(sorted(hashes.items()))}


def _measure_run(name: str) -> dict[str, Any]:
    data = "store" if name == "store" else "colours"
    words = f"{RUNS[name]} {_COMMON.replace('DATA', data)} --working-directory runs --experiment-name {name}"
    _run("train", *words.split())
    run = Path("runs") / name
    views = ("--clips-per-video", 2, "--flip", "--output", run / "eval" / "test")
    _run("eval", "--model", run, "--device", "cpu", "--num-workers", 0, *views)
    clips = sorted(Path("colours").rglob("*_g0[12]_*.avi"))
    said = _run("predict", *clips, "--model", run, "--device", "cpu", "--json")
    film = _run("predict", clips[0], "--model", run, "--device", "cpu", "--json", "--window", "0.1")
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    evaluated = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    return {
        "train": [{k: v for k, v in r.items() if k not in CLOCKS} for r in records],
        "eval": {key: evaluated[key] for key in EVALUATED},
        "predict": [json.loads(line) for line in said.splitlines()],
        "timeline": [{key: json.loads(film)[key] for key in ("video", "seconds", "segments")}],
    }


def _run(*words: object) -> str:
    ended = tvit(*words)
    assert ended.code == 0, f"tvit {' '.join(map(str, words))}\n{ended.err}"
    return ended.out


def _tensors_hash(path: Path) -> str:
    """SHA-256 of names, shapes and bytes, whatever the file's header says."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def rounded(value: Any) -> Any:
    """The same with floats of 7 digits."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def write_committed(found: dict[str, Any]) -> None:
    """Write what tests/test_golden.py reads: numbers only, one line per record."""
    runs = []
    for name, parts in rounded(found["numbers"]).items():
        rows = []
        for part, value in parts.items():
            if isinstance(value, list):
                rows.append(f'"{part}": [\n' + ",\n".join(map(json.dumps, value)) + "\n]")
            else:
                rows.append(f'"{part}": {json.dumps(value)}')
        runs.append(f'"{name}": {{\n' + ",\n".join(rows) + "\n}")
    COMMITTED.write_text("{\n" + ",\n".join(runs) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--commit":
        write_committed(measure())
    else:
        Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
