"""Checker for the project's language: plain first sentences, the field's words, short test names.

    python tests/language.py

Prints a line per finding and exits with 1 if there is any.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parents[1]
MOST_TEST_NAME = 70
# Names and phrases that earlier versions used in place of the field's terms.
NAMES = {
    *(
        "least_of_them", "greatest_of_them", "any_of_them", "told", "held", "noted", "harmless", "Wish",
        "Told",
    ),
    *("Seen", "well", "lean", "what_to_know", "same_again", "who", "whom", "whoever", "misfits", "as_before"),
}  # fmt: skip
TOP_LEVEL_NAMES = {"place", "known", "seen", "opening", "part", "leave", "tell"}
PHRASES = re.compile(
    r"has to be the same|stands? among those|have nothing for|what is classified|apart from their direction"
    r"|lean to the good side|so floats it is|to be believed|what single frames tell|in an update, drawn"
    r"|\bwhoever\b|\bnobody\b|\bstrangers?\b|sure of it|is taken for what|what it learnt",
    re.IGNORECASE,
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def findings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, sentence) for each departure from the rules in a Python file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    is_test = path.is_relative_to(TOP / "tests")
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        if isinstance(node, DOCUMENTED) and re.match(r"\W*What\b", ast.get_docstring(node) or ""):
            yield line, 'a docstring begins with "What"'
        if isinstance(node, ast.Call):
            for text_of in (
                *node.args[1:2],
                *(k.value for k in node.keywords if k.arg in ("help", "description")),
            ):
                if isinstance(text_of, ast.Constant) and str(text_of.value).startswith("What "):
                    yield line, 'a help text begins with "What"'
        names = {getattr(node, field, None) for field in ("id", "arg", "attr", "name")}
        for name in sorted(str(n) for n in names & NAMES):
            yield line, f"the name {name}"
        if (
            isinstance(node, ast.FunctionDef)
            and node.name.startswith("test_")
            and len(node.name) > MOST_TEST_NAME
        ):
            yield line, f"a test name of {len(node.name)} characters, the limit is {MOST_TEST_NAME}"
    for node in tree.body:
        if not is_test and getattr(node, "name", None) in TOP_LEVEL_NAMES:
            yield getattr(node, "lineno", 1), f"the name {getattr(node, 'name', '')}"
    for number, line_of in enumerate(text.splitlines(), 1):
        if found := PHRASES.search(line_of):
            yield number, f'the phrase "{found[0]}"'


def main() -> int:
    """The number of findings in the package, the tests and the examples, which are printed."""
    files = [p for folder in ("tvit_cli", "tests", "examples") for p in sorted((TOP / folder).rglob("*.py"))]
    count = 0
    for path in files:
        if path != Path(__file__):
            for line, sentence in findings(path):
                print(f"{path.relative_to(TOP)}:{line}: {sentence}")
                count += 1
    print(f"{count} findings in {len(files)} files")
    return count


if __name__ == "__main__":
    sys.exit(min(main(), 1))
