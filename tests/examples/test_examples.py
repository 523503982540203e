"""What holds for every example: short, explained, tested, and made of public names alone."""

import ast
import importlib
from pathlib import Path

import pytest
from from_examples import EXAMPLES

FILES = sorted(EXAMPLES.glob("*.py"))
PUBLIC = {"syncdpo": ["ops"]}  # and what these rooms export
ROOMS = ("syncdpo.negatives", "syncdpo.metrics", "syncdpo.data", "syncdpo.ops")


def test_each_has_its_test_and_a_line_in_the_table():
    assert FILES
    table = (EXAMPLES / "README.md").read_text()
    for file in FILES:
        assert (Path(__file__).parent / f"test_{file.name}").exists()
        assert f"[{file.name}]({file.name})" in table
    assert table.count(".py](") == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_short_and_says_what_it_shows_and_how_to_run_it(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") < 60
    what, *how = ast.get_docstring(ast.parse(text)).split("\n")
    assert len(what.split()) >= 8
    assert any(line.startswith("Run: ") for line in how)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_imports_public_names_alone(file):
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    assert not private_imports(tree)


@pytest.mark.parametrize(
    "line",
    ["import syncdpo.ops", "from syncdpo.data.clips import Clip", "from syncdpo import _C",
     "from syncdpo.negatives import pairs"],
)  # fmt: skip
def test_a_private_name_is_seen(line):
    assert private_imports(ast.walk(ast.parse(line)))


def private_imports(nodes) -> list[str]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("syncdpo")]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "syncdpo":
            public = PUBLIC.get(node.module, [])
            if node.module in ROOMS:
                public = importlib.import_module(node.module).__all__
            found += [alias.name for alias in node.names if alias.name not in public]
    return found
