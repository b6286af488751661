"""Files and JSON keys that train, eval, extract and export write, compared with a committed list.

After a deliberate change, regenerate the list and commit it with the change:

    python tests/test_frozen_files.py
"""

import contextlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import pytest
from entry import tvit
from tiny import make_clips, make_pretrained

LIST = Path(__file__).parent / "frozen" / "exports.json"
FORMATS = ("safetensors", "huggingface", "onnx", "torch", "adapter")
ONNX = ("onnx", "onnxruntime", "onnxscript")


def train_tiny(root):
    """A LoRA run, its evaluation and a frame store below `root`."""
    with contextlib.chdir(root):
        make_clips(Path("colours"), groups=3)
        make_pretrained(Path("vit"))
        words = (
            "--path-to-data colours --hf-model-name vit --img-size 32 --n-frames 4 --epochs 1 --lora-rank 2 "
            "--attention divided --device cpu --num-workers 0 --top-k 2 --val-groups 1 --test-groups 1 "
            "--working-directory runs --experiment-name tiny"
        )
        assert tvit("train", *words.split()).code == 0
        assert tvit("eval", "--model", "runs/tiny", "--device", "cpu", "--num-workers", 0).code == 0
        assert tvit("extract", "--path-to-data", "colours", "--output", "store").code == 0


def files(folder):
    """Relative path of each file; keys of each JSON file whose keys are the program's own."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = []
        if path.name in ("card.json", "parity.json", "metrics.json", "state.json", "store.json"):
            found[name] = sorted(json.loads(path.read_text(encoding="utf-8")))
    return found


def export_files(root, name):
    """Files of `tvit export --format NAME`."""
    with contextlib.chdir(root):
        ended = tvit("export", "runs/tiny", "--format", name, "--output", f"out-{name}")
        assert ended.code == 0, ended.err
    return files(root / f"out-{name}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    train_tiny(folder)
    return folder


def compare(name, now):
    before = json.loads(LIST.read_text(encoding="utf-8"))[name]
    lines = [f"removed: {path}" for path in sorted(before.keys() - now.keys())]
    lines += [f"added: {path}" for path in sorted(now.keys() - before.keys())]
    for path in sorted(before.keys() & now.keys()):
        lines += [f"removed: {path}, key {key}" for key in sorted({*before[path]} - {*now[path]})]
        lines += [f"added: {path}, key {key}" for key in sorted({*now[path]} - {*before[path]})]
    assert not lines, "\n".join([f"{name}:", *lines, "If this is meant: python tests/test_frozen_files.py"])


@pytest.mark.parametrize("name", FORMATS)
def test_export_writes_the_frozen_files(name, root):
    if name == "onnx" and any(importlib.util.find_spec(package) is None for package in ONNX):
        pytest.skip('needs the extra: pip install "tvit[onnx]"')
    compare(name, export_files(root, name))


@pytest.mark.parametrize("name", ["runs/tiny", "store"])
def test_training_and_extraction_write_the_frozen_files(name, root):
    compare(name, {path: keys for path, keys in files(root / name).items() if path != ".lock"})


def test_missing_and_new_files_are_named():
    before = json.loads(LIST.read_text(encoding="utf-8"))["store"]
    with pytest.raises(AssertionError, match=r"removed: store\.json\s+added: other"):
        compare("store", {k: v for k, v in before.items() if k != "store.json"} | {"other": []})


def write_list():
    """Write the list, one file per line."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        train_tiny(root)
        parts = {name: files(root / name) for name in ("runs/tiny", "store")}
        parts["runs/tiny"].pop(".lock", None)
        parts |= {name: export_files(root, name) for name in FORMATS}
    rows = [
        f'"{part}": {{\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}"
        for part, found in parts.items()
    ]
    LIST.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_list())
