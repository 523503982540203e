"""Rooms use only what lies below them, and no file needs itself: by every import that is written.

Imports within functions count, and those for type checkers too.
"""

import ast
import graphlib
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room may import beside itself; every one may ask `syncdpo` for its version.
MAY_USE = {
    "__main__": {"cli", "info"},
    "cli": {"demo", "evidence", "report", "train", "sampling", "evaluation", "info", "training",
            "models", "negatives", "data", "versions", "ranking"},
    "demo": {"report", "train", "sampling", "training", "models", "data", "metrics"},
    "evidence": {"demo", "ranking", "train", "sampling", "training", "models", "data", "metrics"},
    "report": {"training", "data", "metrics"},
    "train": {"training", "models", "negatives", "data", "ops"},
    "sampling": {"models", "data"},
    "evaluation": {"data", "metrics"},
    "ranking": {"sampling", "evaluation", "models", "data"},
    "training": {"sampling", "evaluation", "models", "negatives", "data", "metrics", "ops"},
    "models": {"negatives", "data", "ops", "versions"},
    "negatives": {"ops"},
    "data": {"metrics"},
    "metrics": set(),
    "ops": {"kernels", "_C"},
    "kernels": set(),
    "info": {"_C"},
    "testing": set(),
    "versions": set(),
}  # fmt: skip


def modules(package: Path) -> dict[str, Path]:
    """Dotted name → file of everything in the package, the kernels included."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(("syncdpo", *parts)).removesuffix(".__init__")] = path
    for path in (package.parent / "kernels").glob("*.py"):
        found[f"syncdpo.kernels.{path.stem}"] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Module → the modules of this package that it imports, anywhere in its text."""
    files = modules(package)
    ours = files.keys() | {"syncdpo._C"}
    return {
        name: {
            module
            for node in ast.walk(ast.parse(path.read_text()))
            for wanted in named(node, name, path.name == "__init__.py")
            # `from a import b` asks for the file a/b.py, or for what a itself defines
            for module in (wanted, wanted.rpartition(".")[0])[: 1 if wanted in ours else 2]
            if module in ours and module != name
        }
        for name, path in files.items()
    }


def named(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """What an import statement asks for, in full."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    here = module.split(".")
    above = here[: len(here) - node.level + is_package] if node.level else []
    origin = ".".join([*above, *filter(None, [node.module])])
    return [f"{origin}.{alias.name}" for alias in node.names]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "syncdpo"


def upward(package: Path) -> list[str]:
    """Imports that no arrow allows."""
    return sorted(
        f"{user} → {used}"
        for user, all_used in imports(package).items()
        for used in all_used
        if room(used) not in MAY_USE.get(room(user), set()) | {room(user), "syncdpo"}
    )


def test_every_room_has_its_arrows_and_they_point_down():
    rooms = {room(module) for module in modules(ROOT / "syncdpo")} - {"syncdpo"}
    assert rooms == MAY_USE.keys()
    graphlib.TopologicalSorter(MAY_USE).prepare()  # raises CycleError


def test_nothing_points_up():
    assert not upward(ROOT / "syncdpo")


def test_no_file_needs_itself():
    used = imports(ROOT / "syncdpo")
    # A package's __init__ gathers what its files define; they do not look at it.
    graphlib.TopologicalSorter(used).prepare()


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("ops/paired_noise.py", "from syncdpo.negatives import Timeline", "syncdpo.negatives"),
        ("metrics/onsets.py", "def late():\n    import syncdpo.data.clips", "syncdpo.data.clips"),
        ("negatives/rules.py", "from ..training.config import TrainConfig",
         "syncdpo.training.config"),
        ("data/files.py", "from .. import train", "syncdpo.train"),
        ("data/files.py", "from syncdpo import models", "syncdpo.models"),
    ],
)  # fmt: skip
def test_an_arrow_that_points_up_is_seen(tmp_path, file, line, found):
    package = copy_of_the_package(tmp_path)
    with open(package / file, "a") as source:
        source.write(f"\n{line}\n")
    user = "syncdpo." + file.removesuffix(".py").replace("/", ".")
    assert upward(package) == [f"{user} → {found}"]


def test_a_cycle_is_seen(tmp_path):
    package = copy_of_the_package(tmp_path)
    with open(package / "data" / "files.py", "a") as source:
        source.write("\ndef late():\n    from syncdpo.data.clips import Clip\n")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(imports(package)).prepare()


def copy_of_the_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    without_weights = shutil.ignore_patterns("*.safetensors", "__pycache__")
    return shutil.copytree(ROOT / "syncdpo", folder / "syncdpo", ignore=without_weights)
