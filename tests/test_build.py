"""The build: what a wheel holds and needs, and what CMake does with any nvcc or none.

Every compilation here is shared by several tests; the CMake tests only configure.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE_PACKAGES = sysconfig.get_path("purelib")
MEGABYTE = 1 << 20


def run(*command, env=None, cwd=None) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **(env or {})}
    return subprocess.run(
        [str(part) for part in command], env=environment, cwd=cwd, capture_output=True, text=True
    )


def run_python(folder: Path, program: str) -> str:
    """Python with the packages of `folder` and no editable install of this checkout."""
    start = f"import site; site.addsitedir({str(folder)!r}); "
    paths = os.pathsep.join([str(folder), SITE_PACKAGES])
    result = run(sys.executable, "-S", "-c", start + program, env={"PYTHONPATH": paths}, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def pip(*arguments, **options) -> str:
    quiet = ("--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index")
    result = run(sys.executable, "-m", "pip", *arguments, "-v", *quiet, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


# ---------------------------------------------------------------- sdist and wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = (
        f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))"
    )
    result = run(sys.executable, "-c", program, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return folder / result.stdout.split()[-1]


@pytest.fixture(scope="module")
def built(sdist) -> tuple[Path, str]:
    """The wheel of the sdist, with CUDA where nvcc works, and the log of its build."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent)
    source = sdist.parent / sdist.name.removesuffix(".tar.gz")
    log = pip("wheel", source, "-w", sdist.parent)
    (wheel,) = sdist.parent.glob("*.whl")
    return wheel, log


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(folder)
    return folder


def test_sdist_holds_the_sources_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames()]
    assert {"LICENSE", "pyproject.toml", "CMakeLists.txt", "cmake/ProbeCuda.cmake"} <= set(names)
    bases = {"syncdpo/models/tiny_base.safetensors", "syncdpo/models/tiny_families.safetensors"}
    assert bases <= set(names)
    assert {"CITATION.cff", "tools/check_wheel.py", ".github/workflows/tests.yml"} <= set(names)
    sources = ("csrc", "examples", "kernels", "syncdpo", "tests")
    for source in sources:
        suffixes = {".py", ".cpp", ".cu", ".h"}
        here = {p for p in (ROOT / source).rglob("*") if p.suffix in suffixes}
        assert {str(path.relative_to(ROOT)) for path in here} <= set(names)
    assert not [name for name in names if name.startswith((".venv", "build/", "runs/"))]


def test_wheel_holds_the_package_and_the_kernels(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
    kernels = {f"syncdpo/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "syncdpo").rglob("*.py")}
    assert kernels | package | {"syncdpo/py.typed"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert "syncdpo/kernels/__init__.py" not in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "syncdpo",
        *(top for top in tops if re.fullmatch(r"syncdpo-.*\.dist-info", top)),
    }


def test_wheel_is_small(built):
    with zipfile.ZipFile(built[0]) as archive:
        assert sum(info.compress_size for info in archive.infolist()) < 2 * MEGABYTE


def test_compilers_have_nothing_to_warn_of(built):
    assert not re.findall(r".*\bwarning\b.*", built[1], re.IGNORECASE)


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_extension_needs_nothing_but_the_c_and_cpp_libraries(installed):
    """No library of torch or CUDA: so one wheel serves every version of torch, GPU or none."""
    (extension,) = installed.glob("syncdpo/_C.*.so")
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", extension).stdout))
    assert needed <= {
        "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0",
        "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
    }  # fmt: skip
    symbols = run("readelf", "--dyn-syms", "--wide", extension).stdout
    assert not re.findall(r"(?:c10|at|torch)\d", symbols)


def test_installed_wheel_works(installed):
    program = """
import torch, syncdpo.kernels
from importlib.util import find_spec
from syncdpo.info import describe
from syncdpo.ops import Segments, replace_segments
zero = torch.zeros(2)
segments = Segments(zero, zero + 2, torch.tensor([1, 0]), zero)
x = torch.arange(8.0).view(2, 4)
print(replace_segments(x, None, segments, video_rate=1.0, audio_rate=None)[0].tolist())
print(syncdpo.__file__, list(syncdpo.kernels.__path__))
print(describe())
"""
    result, paths, *description = run_python(installed, program).splitlines()
    assert result == "[[4.0, 5.0, 2.0, 3.0], [0.0, 1.0, 6.0, 7.0]]"
    assert paths.count(str(installed)) == 2
    assert "C++ kernel" in "\n".join(description)


# ---------------------------------------------------------------- editable, without CUDA


def test_editable_install_sees_sources_and_kernels(tmp_path):
    log = pip("install", "-e", ROOT, "--target", tmp_path, env={"SYNCDPO_CUDA": "OFF"})
    assert not re.findall(r".*\bwarning:.*", log)
    program = """
import syncdpo.ops.segment_replace, syncdpo.kernels, syncdpo._C as native
print(syncdpo.ops.segment_replace.__file__)
print(*syncdpo.kernels.__path__)
print(native.__file__, native.cuda_version, native.cuda_architectures)
print(__import__("syncdpo.info").info.describe())
"""
    source, kernels, native, *description = run_python(tmp_path, program).splitlines()
    assert source == str(ROOT / "syncdpo/ops/segment_replace.py")
    assert str(ROOT / "kernels") in kernels.split()
    assert native.startswith(str(tmp_path))
    assert native.endswith("None []")
    assert re.search(r"its CUDA kernels +not built", "\n".join(description))


# ---------------------------------------------------------------- CMake and nvcc


def configure(tmp_path: Path, mode: str | None, *options: str, env=None):
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").stdout.strip()
    defines = [f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}", *options]
    defines += [] if mode is None else [f"-DSYNCDPO_CUDA={mode}"]
    build = tmp_path / "build"
    result = run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines, env=env)
    text = re.sub(r"\s+", " ", result.stdout + result.stderr)
    ninja = build / "build.ninja"
    return result.returncode, text, ninja.read_text() if ninja.exists() else ""


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def broken_nvcc(tmp_path) -> dict[str, str]:
    """One that says its version and cannot compile."""
    text = '[ "$1" = --version ] && echo "release 12.8, V12.8.61" && exit\necho no cicc >&2; exit 1'
    return {"CUDACXX": str(script(tmp_path / "nvcc", text))}


def test_no_nvcc_builds_for_the_cpu_and_says_so(tmp_path):
    status, text, ninja = configure(tmp_path, None, "-DSYNCDPO_NVCC=OFF")
    assert status == 0, text
    assert "building without CUDA kernels, since no nvcc was found" in text
    assert "segment_replace.cpp" in ninja
    assert "segment_replace.cu" not in ninja


def test_a_broken_nvcc_builds_for_the_cpu_and_says_why(tmp_path, broken_nvcc):
    status, text, ninja = configure(tmp_path, "AUTO", env=broken_nvcc)
    assert status == 0, text
    assert "cannot build a program: no cicc" in text
    assert "segment_replace.cu" not in ninja


@pytest.mark.parametrize("kind", ["broken", "missing", "none", "old"])
def test_cuda_on_fails_without_a_working_nvcc(tmp_path, broken_nvcc, kind):
    old = script(tmp_path / "old", "echo release 11.8, V11.8.89")
    environment, options, reason = {
        "broken": (broken_nvcc, [], "cannot build a program: no cicc"),
        "missing": ({"CUDACXX": str(tmp_path / "nothing")}, [], "nothing --version failed"),
        "none": ({}, ["-DSYNCDPO_NVCC=OFF"], "no nvcc was found"),
        "old": ({"CUDACXX": str(old)}, [], "is CUDA 11.8; 12.0 or newer is needed"),
    }[kind]
    status, text, _ = configure(tmp_path, "ON", *options, env=environment)
    assert status != 0
    assert "SYNCDPO_CUDA=ON, but" in text
    assert reason in text


def test_cuda_off_asks_for_no_nvcc(tmp_path, broken_nvcc):
    status, text, ninja = configure(tmp_path, "OFF", env=broken_nvcc)
    assert status == 0, text
    assert "CUDA" not in text
    assert "segment_replace.cu" not in ninja


def test_a_wrong_mode_is_refused(tmp_path):
    status, text, _ = configure(tmp_path, "MAYBE")
    assert status != 0
    assert "SYNCDPO_CUDA: expected AUTO, ON or OFF, got 'MAYBE'" in text


def test_ccache_is_used_where_there_is_one(tmp_path):
    ccache = script(tmp_path / "ccache", 'exec "$@"')
    status, text, ninja = configure(tmp_path, "OFF", f"-DSYNCDPO_CCACHE={ccache}")
    assert status == 0, text
    assert str(ccache) in ninja


@pytest.mark.parametrize(
    ("release", "architectures"),
    [("12.0", "80;90-real"), ("12.8", "80;90-real;100-real"), ("13.0", "80;90-real;100-real")],
)
def test_architectures_of_each_cuda(tmp_path, release, architectures):
    program = tmp_path / "architectures.cmake"
    program.write_text(
        f'include("{ROOT}/cmake/ProbeCuda.cmake")\n'
        f'syncdpo_cuda_architectures("{release}" result)\nmessage("${{result}}")\n'
    )
    assert run("cmake", "-P", program).stderr.strip() == architectures
