"""Import arrows between packages, and late imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tvit_cli"
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))
# A room may import the rooms named beside it, and itself.
ROOMS = {
    "errors": set(),
    "files": {"errors"},
    "results": set(),
    "settings": {"errors", "files", "results"},
    "portable": set(),
    "data": {"errors", "files", "results", "settings", "portable"},
    "model": {"errors", "files", "results", "settings", "portable"},
    "report": {"errors", "files", "results", "settings", "portable", "data", "model"},
    "engine": {"errors", "files", "results", "settings", "portable", "data", "model", "report"},
    "console": {"errors", "files", "results"},
    "api": {"errors", "results", "settings", "console", "engine"},
    "commands": {"errors", "files", "results", "settings", "console", "engine", "api"},
    "cli": {"errors", "settings", "commands", "console", "api"},
    "__main__": {"cli"},
    "__init__": {"errors", "results", "data", "engine", "api"},
}
HEAVY = {
    "torch", "numpy", "av", "accelerate", "peft", "transformers", "wandb", "safetensors", "simplejpeg",
    "huggingface_hub", "PIL", "tensorboard", "onnx", "onnxruntime",
}  # fmt: skip


def is_type_checking(node):
    return ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path, *, top_level=False):
    """The modules that a file imports, relative ones resolved; `top_level` leaves those in functions out."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    if path == Path("results.py"):  # names the types of its fields, and imports none of them at run time
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and is_type_checking(node))]
    nodes = tree.body if top_level else list(ast.walk(tree))
    package = ["tvit_cli", *path.parent.parts]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {
                f"{module}.{alias.name}" for alias in node.names if module.startswith("tvit_cli")
            }
    return found


def room(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_arrows_point_one_way(path):
    allowed = ROOMS[room(path)] | {room(path)}
    rooms = {p.stem if p.parent == Path() else p.parts[0] for p in MODULES}
    for name in imports(path):
        if not name.startswith("tvit_cli."):
            continue
        target = name.removeprefix("tvit_cli.")
        if target.split(".")[0] in rooms:
            assert any(target == a or target.startswith(a + ".") for a in allowed), f"{path} imports {target}"


def test_no_import_circles():
    names = {".".join(("tvit_cli", *p.with_suffix("").parts)).removesuffix(".__init__"): p for p in MODULES}
    arrows = {name: (imports(path) & names.keys()) - {name} for name, path in names.items()}
    packages = {name for name, path in names.items() if path.name == "__init__.py"}
    for name in names:  # `from package.module import x` names the package, too
        arrows[name] -= {p for p in packages if any(a.startswith(f"{p}.") for a in arrows[name])}
    while leaves := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
    assert not arrows, f"import each other: {sorted(arrows)}"


NETWORK = ("vit", "layers", "config")


@pytest.mark.parametrize("path", [Path("portable", f"{name}.py") for name in NETWORK], ids=str)
def test_the_model_itself_imports_torch_and_nothing_else(path):
    standard = {"__future__", "math", "collections.abc", "contextlib", "dataclasses", "typing"}
    for name in imports(path):
        top = name.split(".")[0]
        own = name.removeprefix("tvit_cli.portable.").split(".")[0] in NETWORK
        assert top == "torch" or name in standard or own, name


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if room(p) in ("errors", "files", "results", "settings", "commands", "cli")],
    ids=str,
)
def test_what_help_needs_loads_nothing_heavy(path):
    tops = {name.split(".")[0] for name in imports(path, top_level=True)}
    assert not tops & HEAVY


def test_peft_is_imported_by_two_modules_and_the_console_alone_writes():
    assert [str(p) for p in MODULES if any(n.split(".")[0] == "peft" for n in imports(p))] == [
        "engine/export/adapter.py",
        "model/lora.py",
    ]
    for path in MODULES:
        text = (ROOT / path).read_text(encoding="utf-8")
        writes = re.search(r"^\s*print\(|sys\.std(out|err)\.write|typer\.echo", text, re.MULTILINE)
        assert not writes or path.name in ("console.py", "cli.py"), path


def test_every_module_names_its_subject_and_no_note_is_missing():
    for path in MODULES:
        doc = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        assert doc and doc.splitlines()[0].strip(), path
    texts = [(ROOT / p).read_text(encoding="utf-8") for p in MODULES]
    titles = {m for t in texts for m in re.findall(r"(?<![Ss]ee )Note \[([^\]]+)\]", t)}
    referred = {m for t in texts for m in re.findall(r"[Ss]ee Note \[([^\]]+)\]", t)}
    assert referred <= titles
