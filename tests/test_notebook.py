"""The example notebook: runs offline, stored without outputs of a machine."""

import json
import re
from pathlib import Path

from needs import need

import tvit_cli
from tvit_cli.data.motions import CLASSES

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"
# a folder of some machine
ELSEWHERE = re.compile(r"/(?:home|root|tmp|work|opt|Users|var)/|[A-Z]:\\\\|site-packages")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    """A cell's stdout, which nbformat stores as lines or as one text."""
    return "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")


def pictures(cell):
    return sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in cell["outputs"])


def test_the_notebook_trains_evaluates_explains_and_exports(tmp_path, monkeypatch):
    need("nbclient", "ipykernel", "onnx", "onnxruntime", "onnxscript")
    import nbformat
    from nbclient import NotebookClient

    tvit_cli.make_motions(tmp_path / "data" / "motions", clips_per_group=1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no profile in the home folder
    monkeypatch.setenv("TVIT_NUM_WORKERS", "0")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
    first = code_cells(notebook)[0]
    assert "epochs = 8" in first["source"]
    first["source"] = first["source"].replace("epochs = 8", "epochs = 2")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    said = "".join(map(printed, code_cells(notebook)))
    assert re.search(
        r"^Epoch [12] is the best: validation top-1 [01]\.\d{3}\nTest top-1 [01]\.\d{3}$", said, re.MULTILINE
    )
    assert re.search(r"^top-1 .* on 32 videos\ntop-1 [01]\.\d{3} with shuffled frames$", said, re.MULTILINE)
    assert len(re.findall(rf"^ *(?:{'|'.join(CLASSES)})  +\d+\.\d%", said, re.MULTILINE)) == 5
    assert "(24, 64, 64, 3) at 12 fps" in said and "random orders beaten" in said
    assert re.search(r"^ *0\.0 s to +\d+\.\d s  \w+ +[01]\.\d{3}$", said, re.MULTILINE)
    assert len(re.findall(r"^-?[01]\.\d{3}  v_\w+_g\d\d_c01\.avi$", said, re.MULTILINE)) == 5
    assert "clips: top-1 agreement 1.000" in said
    label, of_file, of_model = re.findall(r"(\w+): ([\d.]+) from the file, ([\d.]+) from the model", said)[0]
    assert label in CLASSES and of_file == of_model
    assert sum(map(pictures, code_cells(notebook))) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"data", "ipython", "working_directory"}


def test_what_the_notebook_shows_was_made_by_it_and_tells_of_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(o["output_type"] != "error" and o.get("name") != "stderr" for c in cells for o in c["outputs"])
    assert not ELSEWHERE.search(text), ELSEWHERE.search(text)
    assert sum(map(pictures, cells)) == 3 and len(text) < 250_000
    assert "from the file" in printed(cells[-1])
