"""What a stranger meets first: versions, workflows, instructions; and what a release must pass."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version() -> str:
    (found,) = re.findall(r'^version = "(.+)"$', read("pyproject.toml"), re.M)
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.M))


def targets_in(text: str) -> set[str]:
    """The targets of every `make …` at the start of a line, of a step or of a quotation."""
    commands = re.findall(r"(?:^\s*(?:- run: )?|`)make((?: [a-z-]+)+)", text, re.M)
    return {target for command in commands for target in command.split()}


# ---------------------------------------------------------------- one version, one set of Pythons


def test_versions_agree():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == version()
    assert f'license = "{citation["license"]}"' in read("pyproject.toml")
    assert f'Homepage = "{citation["repository-code"]}"' in read("pyproject.toml")
    assert f"version = {{{version()}}}" in read("CITATION.bib")
    assert f"url     = {{{citation['repository-code']}}}" in read("CITATION.bib")
    newest = re.search(r"^## (\S+) — (.+)$", read("CHANGELOG.md"), re.M)
    assert newest.group(1) == version()


def test_ruff_of_the_hook_is_that_of_the_project():
    (wanted,) = re.findall(r'"(ruff==\S+)"', read("pyproject.toml"))
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]
    assert all(hook["additional_dependencies"] == [wanted] for hook in repository["hooks"])


def test_every_python_of_the_classifiers_has_a_wheel_that_is_checked():
    project = read("pyproject.toml")
    assert re.findall(r"Python :: (3\.\d+)", project) == PYTHONS
    (build,) = re.findall(r'^build = "cp3\{(.*)\}-manylinux_x86_64"$', project, re.M)
    assert [f"3.{minor}" for minor in build.split(",")] == PYTHONS
    jobs = yaml.safe_load(read(".github/workflows/wheels.yml"))["jobs"]
    assert jobs["check"]["strategy"]["matrix"]["python"] == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in project


# ---------------------------------------------------------------- workflows


def steps(workflow: dict) -> list[dict]:
    """Steps of all jobs; a job that is another workflow counts as one."""
    jobs = workflow["jobs"].values()
    return [step for job in jobs for step in job.get("steps", [job])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_pinned_and_may_do_little(path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"].startswith(f"{path.stem}-")
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    for action in used:
        if action.startswith("./"):
            assert (ROOT / action).is_file()
        else:
            assert re.search(rf"uses: {action} # v\d+\.\d+\.\d+$", text, re.M), action
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)
    for step in steps(workflow):
        assert not {"password", "token"} & step.get("with", {}).keys()
        assert "actions/checkout" not in step.get("uses", "") or (
            step["with"]["persist-credentials"] is False
        )


def test_workflows_call_what_there_is():
    assert [path.stem for path in WORKFLOWS] == ["release", "tests", "wheels"]
    runs = [step.get("run", "") for path in WORKFLOWS for step in steps(yaml.safe_load(read(path)))]
    called = set().union(*(targets_in(run) for run in runs))
    assert called == {"lint", "test"}
    assert called <= make_targets()
    scripts = re.findall(r"tools/\w+\.py", "\n".join(runs))
    assert {Path(script).stem for script in scripts} == {"check_release", "check_wheel"}
    assert all((ROOT / script).is_file() for script in scripts)


def test_only_the_job_that_publishes_may_ask_for_an_identity():
    jobs = yaml.safe_load(read(".github/workflows/release.yml"))["jobs"]
    rights = {name: job.get("permissions") for name, job in jobs.items()}
    assert rights == {"tag": None, "wheels": None, "publish": {"id-token": "write"}}
    assert jobs["publish"]["needs"] == "wheels"
    assert jobs["wheels"]["needs"] == "tag"
    assert jobs["publish"]["environment"] == "pypi"


# ---------------------------------------------------------------- instructions


def test_agents_is_short_and_names_only_what_exists():
    text = read("AGENTS.md")
    assert len(text.splitlines()) <= 35
    assert {"install", "lint", "test", "sass", "wheel"} <= targets_in(text) <= make_targets()
    files = set(re.findall(r"\b[A-Z]+\.md\b", text))
    assert files == {"CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}
    assert all((ROOT / name).is_file() for name in files)


def test_contributing_names_only_targets_that_exist():
    assert {"install", "lint", "test", "wheel"} <= targets_in(read("CONTRIBUTING.md"))
    assert targets_in(read("CONTRIBUTING.md")) <= make_targets()


def test_issues_bring_the_output_of_info():
    (form,) = (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    fields = {field["id"]: field for field in yaml.safe_load(read(form))["body"]}
    assert "`syncdpo info`" in fields["info"]["attributes"]["label"]
    assert fields["info"]["validations"]["required"] is True


def test_security_is_true_of_every_load():
    """The only unpickling is torch's restricted one; YAML is never more than values."""
    sources = "\n".join(path.read_text() for path in (ROOT / "syncdpo").rglob("*.py"))
    loads = re.findall(r"torch\.load\(([^)]*)\)", sources)
    assert len(loads) == sources.count("torch.load(") > 0
    assert all("weights_only=True" in load for load in loads)
    assert set(re.findall(r"yaml\.(\w*load\w*)", sources)) == {"safe_load"}
    assert not re.findall(r"pickle\.loads?\(|allow_pickle=True|trust_remote_code=True", sources)


# ---------------------------------------------------------------- before a release


def release(folder: Path, heading: str) -> Path:
    (folder / "pyproject.toml").write_text('version = "1.2.0"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n## 1.1.0 — 2020-01-01\n")
    return folder


def test_a_tag_that_is_the_version_passes(tmp_path):
    tool("check_release").check("v1.2.0", release(tmp_path, "## 1.2.0 — 2030-12-31"))


@pytest.mark.parametrize(
    ("tag", "heading", "reason"),
    [
        ("v1.2.1", "## 1.2.0 — 2030-12-31", r"tag: expected v1\.2\.0, .* got v1\.2\.1"),
        ("1.2.0", "## 1.2.0 — 2030-12-31", "tag: expected v1"),
        ("v1.2.0", "## 1.2.0 — unreleased", "CHANGELOG.md: expected .* got .*unreleased"),
        ("v1.2.0", "no news", r"CHANGELOG.md: .* got '## 1\.1\.0"),
    ],
)
def test_any_other_tag_is_refused(tmp_path, tag, heading, reason):
    with pytest.raises(ValueError, match=reason):
        tool("check_release").check(tag, release(tmp_path, heading))


def test_the_command_refuses_a_tag_with_exit_code_2():
    command = [sys.executable, ROOT / "tools" / "check_release.py", "v0.0.0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"tag: expected v{version()}, ")


GOOD = (
    "syncdpo/py.typed",
    "syncdpo/ops/__init__.py",
    "syncdpo/ops/_checks.py",
    "syncdpo/ops/dpo_loss.py",
    "syncdpo/kernels/dpo_loss.py",
    "syncdpo/_C.so",
)


def test_check_wheel_knows_every_op_and_its_test():
    checks = tool("check_wheel")
    ops = {path.stem for path in (ROOT / "syncdpo" / "ops").glob("[a-z]*.py")}
    assert ops <= set(checks.TESTS)
    checks.check_names([*GOOD, *(f"syncdpo/ops/{op}.py" for op in ops)])
    for name in checks.TESTS:
        (path,) = (ROOT / "tests").rglob(f"test_{name}.py")
        assert "__file__" not in path.read_text(), f"{path.name} reads the checkout"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (set(GOOD) - {"syncdpo/py.typed"}, "py.typed"),
        (set(GOOD) - {"syncdpo/_C.so"}, "expected one native extension, got 0"),
        ({*GOOD, "syncdpo/_C.other.so"}, "expected one native extension, got 2"),
        (set(GOOD) - {"syncdpo/kernels/dpo_loss.py"}, "expected syncdpo/kernels with dpo_loss.py"),
        ({*GOOD, "syncdpo/kernels/__init__.py"}, "without __init__.py"),
        ({*GOOD, "syncdpo/ops/untested.py"}, "untested"),
        ({*GOOD, "syncdpo/models/tiny_base.safetensors"}, "weights"),
    ],
)
def test_a_wheel_with_the_wrong_contents_is_unfit(names, reason):
    checks = tool("check_wheel")
    with pytest.raises(checks.Unfit, match=reason):
        checks.check_names(sorted(names))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[str, Path]:
    """One that needs libc alone, one that needs CUDA's runtime, one with a path of its own."""
    if not shutil.which("cc") or not shutil.which("readelf"):
        pytest.skip("needs cc and readelf")
    folder = tmp_path_factory.mktemp("libraries")

    def link(name: str, *options: str) -> Path:
        source = 'int puts(const char*);\nint one(void) { return puts("1"); }\n'
        (folder / "one.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", "-o", folder / name, folder / "one.c", *options]
        subprocess.run(command, check=True)
        return folder / name

    link("libcudart.so", "-Wl,-soname,libcudart.so.13")
    return {
        "plain": link("plain.so"),
        "cuda": link("cuda.so", f"-L{folder}", "-Wl,--no-as-needed", "-lcudart"),
        "path": link("path.so", "-Wl,-rpath,/opt/cuda/lib"),
    }


def fake_wheel(folder: Path, extension: Path, tag: str = "linux_x86_64") -> Path:
    wheel = folder / f"syncdpo-1.2.0-cp311-cp311-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in GOOD:
            archive.writestr(name, extension.read_bytes() if name.endswith(".so") else b"")
    return wheel


def test_a_wheel_that_links_to_the_system_alone_is_fit(libraries, tmp_path):
    platform = "manylinux_2_28_x86_64"
    wheel = fake_wheel(tmp_path, libraries["plain"], f"manylinux_2_27_x86_64.{platform}")
    tool("check_wheel").check_file(wheel, platform)


@pytest.mark.parametrize(
    ("kind", "platform", "reason"),
    [
        ("cuda", None, r"linkage: _C\.so needs libcudart\.so\.13"),
        ("path", None, "looks for libraries in /opt/cuda/lib"),
        ("plain", "manylinux_2_28_x86_64", "among the tags, got linux_x86_64"),
    ],
)
def test_a_wheel_that_needs_more_is_unfit(libraries, tmp_path, kind, platform, reason):
    checks = tool("check_wheel")
    with pytest.raises(checks.Unfit, match=reason):
        checks.check_file(fake_wheel(tmp_path, libraries[kind]), platform)


def test_a_failing_or_missing_test_makes_a_wheel_unfit(tmp_path):
    checks = tool("check_wheel")
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in checks.TESTS:
        (tests / f"test_{name}.py").write_text(f"def test_it(): assert {name != 'velocity'}\n")
    with pytest.raises(checks.Unfit, match="failed against the installed wheel"):
        checks.run_tests(Path(sys.executable), tmp_path / "away", tests)
    (tests / "test_velocity.py").unlink()
    with pytest.raises(checks.Unfit, match=r"test_velocity\.py not found"):
        checks.run_tests(Path(sys.executable), tmp_path / "nowhere", tests)


def test_a_folder_without_a_wheel_for_this_python_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a wheel, or one for cp3\d+ in .*, got none"):
        tool("check_wheel").find_wheel(tmp_path)
