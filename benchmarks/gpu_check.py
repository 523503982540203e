"""Everything that only a GPU can show, in stages, the most telling first; ten minutes for all.

    python benchmarks/gpu_check.py [--stages 1,2,3] [--seconds N] [--output FILE] [--dry-run]

1  one call of each op against its reference, twice, so that the remembered launch runs too
2  the tests of the ops on CUDA: kernels against references, opcheck, torch.compile, peak memory
3  the benchmarks, and what of benchmarks/goals.py is reached
4  benchmarks/sweep.py: are the kernels' constants the best ones?
5  benchmarks/ltx2_step.py: a training step of LTX-2 at full size, with random weights
6  the same bits from run to run, CUDA graphs, compiled training steps, the embedded model trained
   by the kernels, and compute-sanitizer (memcheck, racecheck, initcheck) over one call of each op

What is known goes to benchmarks/results/<gpu>-<date>.json as soon as a check ends; a check that
finds no time left says so. The exit code is the number of checks that failed.

It needs no network, and of the packages for development pytest and pytest-benchmark; stages 5 and 6
say what else they need. To install on such a machine: pip install --no-build-isolation --no-deps .
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import goals
import torch
import triton

from syncdpo import ops
from syncdpo.testing import predictions

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
OPS = ("dpo_loss", "paired_noise", "temporal_warp", "segment_replace")
ROOMS = (*OPS, "launches", "dpo_loss_inputs", "segment_replace_kernels", "velocity", "properties")
STAGES = (1, 2, 3, 4, 5, 6)
PYTEST = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT,
          "-p", "no:cacheprovider"]  # fmt: skip
# Seconds after which a check is given up.
LONGEST = {"tests": 150, "benchmark": 90, "sweep": 100, "step": 170, "rest": 150}
SHAPES = ((4, 1024, 128), (4, 126, 128))
# What a reference and a kernel may differ by at a glance; the tests say how much exactly.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7}

# ---------------------------------------------------------------- one call of each op


def calls(device: str, impl: str = "auto") -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Each op on fixed inputs; the results of one call, gradients included."""
    policy, reference, clean = predictions(*SHAPES, dtype=torch.bfloat16, device=device)
    policy = [p.requires_grad_() for p in policy]
    seed, sigma = torch.arange(2, device=device), torch.tensor([0.2, 0.7], device=device)
    target = [ops.Velocity(x, seed, stream) for stream, x in enumerate(clean)]
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 48, 16, generator=generator).to(device)
    audio = torch.randn(2, 16_000, generator=generator).to(device)
    start, length = torch.tensor([0.1, 0.5], device=device), torch.tensor([0.3, 0.2], device=device)
    donor = torch.arange(2, device=device)
    segments = ops.Segments(start, length, donor, start + 0.4)
    swapped = ops.Segments(start, start + 0.2, 1 - donor, start * 0.5)
    rate = torch.tensor([0.8, 1.25], device=device)
    rates = {"video_rate": 24.0, "audio_rate": 8000.0}

    def loss():
        value, stats = ops.dpo_loss(
            policy, reference, target, beta=[9.0, 9.0], return_stats=True, impl=impl
        )
        return [value.detach(), *stats, *torch.autograd.grad(value, policy)]

    def noised():
        halves = [[x.chunk(2)[half] for x in clean] for half in (0, 1)]
        return list(ops.paired_noise(*halves, sigma, seed, impl=impl))

    def in_place():
        both = video.clone(), audio.clone()
        options = {"crossfade": 0.05, "out": both, "impl": impl} | rates
        return list(ops.replace_segments(*both, swapped, **options))

    return {
        "dpo_loss": loss,
        "paired_noise": noised,
        "noise": lambda: [ops.noise((2, 5000), seed, impl=impl)],
        "scale": lambda: [ops.scale(video, rate, impl=impl)],
        "replace_segments": lambda: list(
            ops.replace_segments(video, audio, segments, impl=impl, **rates)
        ),
        "replace_segments in place": in_place,
    }


# ---------------------------------------------------------------- the checks


def check_first_calls(device: str) -> str:
    expected = {name: call() for name, call in calls(device, "reference").items()}
    for name, call in calls(device).items():
        for again in (False, True):
            for ours, theirs in zip(call(), expected[name], strict=True):
                wrong = f"{name}, {'second' if again else 'first'} call"
                tolerance = TOLERANCE[theirs.dtype]
                scale = theirs.abs().max().item()
                torch.testing.assert_close(
                    ours, theirs, rtol=tolerance, atol=tolerance * scale,
                    msg=lambda text, wrong=wrong: f"{wrong}: {text}",
                )  # fmt: skip
    return f"{len(expected)} calls as their references"


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_graphs() -> str:
    """Capture proves that nothing synchronises; the replay must give the same bits."""
    for name, call in calls("cuda").items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = [x.clone() for x in call()]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for x in captured:
            x.zero_()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert equal(captured, expected), f"{name}: a replay gives other bits"
    return "captured and replayed"


def check_bits(runs: int = 50) -> str:
    """The order in which programs finish must not show, alone or beside other work."""
    noisy_neighbour = torch.cuda.Stream()
    work = torch.randn(4096, 4096, device="cuda")
    for name, call in calls("cuda").items():
        expected = [x.clone() for x in call()]
        for run in range(runs):
            if run % 2:
                with torch.cuda.stream(noisy_neighbour):
                    work @ work
            assert equal(call(), expected), f"{name}: run {run} gives other bits"
    return f"{runs} runs alike"


def check_tests(check: Check) -> str:
    files = [TESTS / "ops" / f"test_{room}.py" for room in ROOMS]
    if check.dry:
        return last_line(check.run([*PYTEST, "--collect-only", *files]))
    # Compiling is most of it, and the processor's work; each worker has a context on the GPU.
    parallel = ["-n", str(min(12, os.cpu_count()))] if find_spec("xdist") else []
    return last_line(check.run([*PYTEST, *parallel, *files]))


def check_benchmark(check: Check, files: list[Path]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmarks.json"
        command = [*PYTEST, f"--benchmark-json={output}", *files]
        if check.dry:  # the ways that need no compiler, on what is small
            command += ["-k", "not compile and not slicing and not reference and not raw"]
            return last_line(check.run(command))
        try:
            print(check.run(command).split("- benchmark:")[0], flush=True)
        finally:
            kept = output.read_text() if output.exists() else ""
            rows = json.loads(kept)["benchmarks"] if kept else []
            check.results["benchmarks"] |= {row["name"]: row["extra_info"] for row in rows}
    return f"{len(rows)} rows"


def check_script(check: Check, name: str) -> str:
    """A script that keeps its results as they come; what it has by the end is kept here."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--output", output]
        command += ["--dry-run"] if check.dry else ["--seconds", str(int(check.left() - 10))]
        try:
            said = check.run(command)
            print("" if check.dry else said, flush=True)
        finally:
            if output.exists() and output.read_text():
                check.results[name] = json.loads(output.read_text())
    return last_line(said)


def check_training(check: Check) -> str:
    if missing := [name for name in ("diffusers", "peft", "accelerate") if not find_spec(name)]:
        return f"left out: the embedded model needs {', '.join(missing)}"
    return some_tests(check, "training/test_trained_by_kernels.py", "cuda")


def check_compiled(check: Check) -> str:
    """Of the subsets that the tests compile, those that go all the way to the device."""
    return some_tests(check, "ops/test_compile.py", "inductor or graphs or schedule")


def some_tests(check: Check, file: str, chosen: str) -> str:
    dry = ["--collect-only"] if check.dry else []
    return last_line(check.run([*PYTEST, *dry, "-k", chosen, TESTS / file]))


def check_sanitizer(check: Check, kind: str) -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "left out: no compute-sanitizer here; it comes with CUDA's toolkit"
    command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--once"]
    # Each tensor in an allocation of its own, so that its bounds and its first writes are seen.
    check.run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return "nothing found"


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


# ---------------------------------------------------------------- running them


class Check:
    """One check: what it may take, where its results go, and whether it only shows that it runs."""

    def __init__(self, results: dict, end: float, kind: str, dry: bool) -> None:
        self.results, self.dry = results, dry
        self.end = min(end, time.monotonic() + LONGEST[kind])

    def left(self) -> float:
        return max(self.end - time.monotonic(), 1.0)

    def run(self, command: list, **environment: str) -> str:
        """Output of a command, run where the source tree does not hide the installed package."""
        # Several run side by side, and the GPU does the work: a thread each, as in `make test`.
        known = {"OMP_NUM_THREADS": "1"} | os.environ
        known.pop("TRITON_INTERPRET", None)
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                command, cwd=folder, env=known | environment, capture_output=True, text=True,
                timeout=self.left(), check=False,
            )  # fmt: skip
        text = done.stdout[-6000:] + done.stderr[-2000:]
        assert done.returncode == 0, f"{Path(command[0]).name}: exit {done.returncode}\n{text}"
        return done.stdout


def attempt(name: str, check: Callable[[], str], results: dict, end: float) -> None:
    start = time.perf_counter()
    try:
        assert time.monotonic() < end, "not run: no time left; --stages picks it alone"
        outcome, passed = check(), True
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"")[-2000:].decode(errors="replace")
        outcome, passed = f"given up after {error.timeout:.0f} s\n{said}", False
    except Exception as error:  # whatever it is, the other checks go on
        outcome, passed = f"{type(error).__name__}: {error}", False
    seconds = round(time.perf_counter() - start, 1)
    results["checks"][name] = {"passed": passed, "outcome": outcome, "seconds": seconds}
    print(f"{'ok  ' if passed else 'FAIL'} {name} ({seconds} s): {outcome}", flush=True)


def steps(
    stages: list[int], results: dict, end: float, dry: bool, sanitizer: bool
) -> Iterator[dict[str, Callable[[], str]]]:
    """What is checked, stage by stage; what shares a step runs side by side."""

    def of(function: Callable, kind: str, *arguments) -> Callable[[], str]:
        return lambda: function(Check(results, end, kind, dry), *arguments)

    device = "cpu" if dry else "cuda"
    if 1 in stages:
        yield {"first calls": partial(check_first_calls, device)}
    if 2 in stages:
        yield {"tests": of(check_tests, "tests")}
    if 3 in stages:
        files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
        for some in [files] if dry else [[file] for file in files]:
            yield {", ".join(file.stem for file in some): of(check_benchmark, "benchmark", some)}
    if 4 in stages:
        yield {"sweep": of(check_script, "sweep", "sweep")}
    if 5 in stages:
        yield {"LTX-2 step": of(check_script, "step", "ltx2_step")}
    if 6 in stages:
        if not dry:
            yield {"CUDA graphs": check_graphs}
            yield {"the same bits": check_bits}
        kinds = ("memcheck", "racecheck", "initcheck") if sanitizer and not dry else ()
        longest = {
            "embedded model": of(check_training, "rest"),
            "compiled steps": of(check_compiled, "rest"),
        }
        yield longest | {kind: of(check_sanitizer, "rest", kind) for kind in kinds}


def machine() -> dict:
    """What the results were measured on, as found."""
    found = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    if shutil.which("nvidia-smi"):
        query = [f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        said = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=False)
        found |= dict(zip(asked, said.stdout.strip().split(", "), strict=False))
    return found


def stages_of(text: str) -> list[int]:
    stages = [int(part) for part in text.split(",")]
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"expected some of {STAGES}, got {sorted(unknown)}")
    return stages


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=stages_of, default=list(STAGES), metavar="1,2,…")
    parser.add_argument("--seconds", type=float, default=580, help="for all stages together")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>-<date>.json")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument(
        "--dry-run", action="store_true", help="each stage as far as a CPU takes it"
    )
    parser.add_argument("--once", action="store_true", help="one call of each op on the GPU")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            "gpu_check.py: no GPU here; --dry-run takes the stages as far as a CPU does",
            file=sys.stderr,
        )
        return 2
    if arguments.once:
        for name, call in calls("cuda").items():
            call()
            torch.cuda.synchronize()
            print(f"ok   {name}")
        return 0

    results = {**machine(), "stages": arguments.stages, "checks": {}, "benchmarks": {}}
    print(*(f"{name} {value}" for name, value in results.items() if value), sep=", ", flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", results["gpu"].lower()).strip("-")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"{name}-{results['date']}.json"
    if arguments.output is None and arguments.dry_run:
        output = Path(tempfile.gettempdir()) / "gpu-check-dry-run.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    for step in steps(
        arguments.stages, results, end, arguments.dry_run, not arguments.skip_sanitizer
    ):
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda item: attempt(*item, results, end), step.items()))
        results["goals"] = goals.table(results)
        output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if results["benchmarks"]:
        print(goals.text(results["goals"]))
    print(f"written to {output}")
    return sum(not check["passed"] for check in results["checks"].values())


if __name__ == "__main__":
    sys.exit(main())
