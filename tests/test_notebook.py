"""The example notebook: runs offline, stored without outputs of a machine."""

import json
import re
from pathlib import Path

from needs import need
from tiny import make_model

import tvit_cli
from tvit_cli.data.motions import CLASSES

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "inference.ipynb"
# a folder of some machine
ELSEWHERE = re.compile(r"/(?:home|root|tmp|work|opt|Users|var)/|[A-Z]:\\\\|site-packages")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    """A cell's stdout, which nbformat stores as lines or as one text."""
    return "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")


def pictures(cell):
    return sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in cell["outputs"])


def test_the_notebook_runs_from_the_model_to_the_onnx_file(tmp_path, monkeypatch):
    need("nbclient", "ipykernel", "onnx", "onnxruntime", "onnxscript")
    import nbformat
    from nbclient import NotebookClient

    model = make_model(tmp_path / "model", CLASSES)
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no profile in the home folder
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    said = "".join(map(printed, code_cells(notebook)))
    assert f"{len(CLASSES)} classes: {', '.join(CLASSES)}" in said
    labels = tvit_cli.load_model(model, device="cpu").labels
    assert len(re.findall(rf"^ *(?:{'|'.join(labels)})  +\d+\.\d%", said, re.MULTILINE)) == 5
    assert re.search(r"^ *0\.0 s to +\d+\.\d s  \w+ +0\.\d{3}$", said, re.MULTILINE)
    assert len(re.findall(r"^-?[01]\.\d{3}  v_\w+_g\d\d_c01\.avi$", said, re.MULTILINE)) == 5
    assert "clips: top-1 agreement 1.000" in said
    label, of_file, of_model = re.findall(r"(\w+): ([\d.]+) from the file, ([\d.]+) from the model", said)[0]
    assert label in labels and of_file == of_model
    assert sum(map(pictures, code_cells(notebook))) == 3
    assert [path.name for path in tmp_path.iterdir() if path.name != "ipython"] == ["model"]


def test_what_the_notebook_shows_was_made_by_it_and_tells_of_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(o["output_type"] != "error" and o.get("name") != "stderr" for c in cells for o in c["outputs"])
    assert not ELSEWHERE.search(text), ELSEWHERE.search(text)
    assert sum(map(pictures, cells)) == 3 and len(text) < 250_000
    assert "from the file" in printed(cells[-2])
