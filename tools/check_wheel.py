"""Is this wheel fit for PyPI? What it holds, what it links to, and the ops' tests against it.

    python tools/check_wheel.py dist                      the wheel in dist/ for this Python
    python tools/check_wheel.py some.whl --cuda 13.0 --platform manylinux_2_28_x86_64

First the file: typed, with its kernels, without weights; the extension needs the C and C++
libraries and nothing of torch, CUDA or a driver, so that one wheel serves every torch, with a GPU
or without. Then the package, installed in a virtual environment of its own: every op and kernel is
imported, and the ops' tests run where nothing of this checkout lies but `tests/` and its settings.
Exits with 0 if all of that holds, with 1 if not, and with 2 if there is no wheel to check.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Those of the ops' tests that read nothing of a checkout: no sources, no benchmarks.
TESTS = (
    "temporal_warp",
    "segment_replace",
    "paired_noise",
    "dpo_loss",
    "dpo_loss_inputs",
    "velocity",
)

# The C and C++ libraries. Up to glibc 2.33, threads, dlopen and timers are files of their own.
SYSTEM_LIBRARIES = {
    "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6",
    "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip

# For the environment's own Python: imports every op and kernel; where from, and what was built.
PROBE = """
import importlib, pkgutil
import syncdpo.kernels, syncdpo.ops, syncdpo._C as native
from syncdpo.info import describe
for room in (syncdpo.ops, syncdpo.kernels):
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{module.name}")
print(syncdpo.__path__[0], native.cuda_version, sep="\\n")
print(describe())
"""


class Unfit(Exception):
    """What is wrong with the wheel, in a sentence."""


# ---------------------------------------------------------------- the file


def check_file(wheel: Path, platform: str | None = None) -> None:
    """What can be told without installing it. Raises Unfit."""
    tags = wheel.stem.split("-")[-1].split(".")
    if platform and platform not in tags:
        raise Unfit(f"platform: expected {platform} among the tags, got {', '.join(tags)}")
    with zipfile.ZipFile(wheel) as archive:
        check_names(archive.namelist())
        (extension,) = (name for name in archive.namelist() if name.startswith("syncdpo/_C."))
        with tempfile.TemporaryDirectory() as folder:
            check_linkage(Path(archive.extract(extension, folder)))


def check_names(names: list[str]) -> None:
    """Types, one extension, the kernels as a bare folder, a test for each op, and no weights."""
    extensions = [name for name in names if name.startswith("syncdpo/_C.")]
    ops = set(re.findall(r"^syncdpo/ops/([a-z]\w*)\.py$", "\n".join(names), re.M))
    weights = [name for name in names if name.endswith((".safetensors", ".pt", ".bin"))]
    if "syncdpo/py.typed" not in names:
        raise Unfit("contents: no syncdpo/py.typed, so no type checker reads its annotations")
    if len(extensions) != 1:
        raise Unfit(f"contents: expected one native extension, got {len(extensions)}")
    if "syncdpo/kernels/dpo_loss.py" not in names or "syncdpo/kernels/__init__.py" in names:
        raise Unfit("contents: expected syncdpo/kernels with dpo_loss.py and without __init__.py")
    if not ops or ops - set(TESTS):
        raise Unfit(f"contents: ops are {sorted(ops)}, TESTS in {__file__} has {sorted(TESTS)}")
    if weights:
        raise Unfit(f"contents: holds weights, {weights[0]}")


def check_linkage(extension: Path) -> None:
    """Only libraries that every Linux has, found where the system keeps them."""
    entries = output("readelf", "--dynamic", "--wide", extension)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", entries))
    if not needed:
        raise Unfit(f"linkage: {extension.name} is no shared library")
    if foreign := needed - SYSTEM_LIBRARIES:
        raise Unfit(f"linkage: {extension.name} needs {', '.join(sorted(foreign))}")
    if paths := re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", entries):
        raise Unfit(f"linkage: {extension.name} looks for libraries in {paths[0]}")
    print(f"{extension.name} needs {', '.join(sorted(needed))}")


# ---------------------------------------------------------------- the package, installed


def check_installed(wheel: Path, folder: Path, tests: Path, torch: str, cuda: str | None) -> None:
    """Install it in `folder`, import all of it, and run the ops' tests there. Raises Unfit."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    output(
        python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        wheel.resolve(), torch, "numpy", "pytest",
    )  # fmt: skip
    package, cuda_version, *description = output(python, "-I", "-c", PROBE).splitlines()
    print("\n".join(description), flush=True)
    if not Path(package).is_relative_to(environment.resolve()):
        raise Unfit(f"installed: imported from {package}, expected from {environment}")
    if cuda and cuda_version != cuda:
        raise Unfit(f"cuda: expected kernels built by CUDA {cuda}, got {cuda_version}")
    run_tests(python, folder / "away", tests)


def run_tests(python: Path, away: Path, tests: Path) -> None:
    """The tests that TESTS names, wherever below `tests` they are, from a copy in `away`."""
    copy = away / "tests"
    shutil.copytree(tests, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", away)  # pytest's settings
    files = [found for name in TESTS for found in copy.rglob(f"test_{name}.py")]
    if missing := {f"test_{name}.py" for name in TESTS} - {file.name for file in files}:
        raise Unfit(f"tests: {', '.join(sorted(missing))} not found in {tests}")
    command = [python, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    if subprocess.run(command, cwd=away, env=plain_environment(), check=False).returncode:
        raise Unfit("tests: failed against the installed wheel")


def plain_environment() -> dict[str, str]:
    """This one, without what would change how Python, pytest or Triton find and run things."""
    ours = ("PYTHON", "PYTEST_", "TRITON_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def output(*command: str | Path) -> str:
    """What a command prints. Raises Unfit where it fails."""
    result = subprocess.run(
        [str(part) for part in command], env=plain_environment(), capture_output=True, text=True
    )
    if result.returncode:
        raise Unfit(f"{Path(command[0]).name} failed: {result.stderr.strip() or result.stdout}")
    return result.stdout


# ---------------------------------------------------------------- the command line


def find_wheel(place: Path) -> Path:
    """A wheel, or the one in a folder that is for this Python."""
    if place.suffix == ".whl" and place.is_file():
        return place
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(place.glob(f"*-{version}-*.whl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"wheel: expected a wheel, or one for {version} in {place}, got {names}")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="a wheel, or a folder with one for this Python")
    parser.add_argument("--platform", help="a tag it must bear, such as manylinux_2_28_x86_64")
    parser.add_argument("--cuda", help="the CUDA version that must have built its kernels")
    parser.add_argument("--torch", default="torch", help="requirement, such as 'torch==2.11.*'")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the folder of tests")
    options = parser.parse_args()
    try:
        wheel = find_wheel(options.wheel)
        print(wheel.name)
        check_file(wheel, options.platform)
        with tempfile.TemporaryDirectory() as folder:
            check_installed(wheel, Path(folder), options.tests, options.torch, options.cuda)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except Unfit as error:
        print(f"{wheel.name} is unfit: {error}", file=sys.stderr)
        return 1
    print(f"{wheel.name} is fit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
