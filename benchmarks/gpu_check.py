"""Everything that only a GPU can show, in one command of under ten minutes.

    python benchmarks/gpu_check.py [--dry-run] [--skip-sanitizer] [--output FILE]

In turn: each op captured in a CUDA graph and replayed; the same bits from run to run and beside
other work; side by side, the tests of the ops on CUDA (kernels against references, opcheck,
torch.compile, peak memory) and compute-sanitizer over one call of each op; the benchmarks, alone.
The results go to benchmarks/results/<gpu>-<date>.json, after each check what is known by then; the
exit code is the number of failed checks.

It needs no network, and of the packages for development pytest and pytest-benchmark. To install on
such a machine: pip install --no-build-isolation --no-deps .
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
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

import torch
import triton

from syncdpo import ops
from syncdpo.testing import predictions

ROOT = Path(__file__).parent.parent
OPS = ("dpo_loss", "paired_noise", "temporal_warp", "segment_replace")
ROOMS = (*OPS, "dpo_loss_inputs", "segment_replace_kernels", "velocity", "properties")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT,
          "-p", "no:cacheprovider"]  # fmt: skip
# Seconds after which a command is given up, and all of them together.
LONGEST = {"tests": 240, "sanitizer": 240, "benchmark": 200}
END = time.monotonic() + 580
SHAPES = ((4, 1024, 128), (4, 126, 128))

# ---------------------------------------------------------------- one call of each op


def calls(device: str) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Each op on fixed inputs; the results of one call, gradients included."""
    policy, reference, clean = predictions(*SHAPES, dtype=torch.bfloat16, device=device)
    policy = [p.requires_grad_() for p in policy]
    seed, sigma = torch.arange(2, device=device), torch.tensor([0.2, 0.7], device=device)
    target = [ops.Velocity(x, seed, stream) for stream, x in enumerate(clean)]
    video = torch.randn(2, 48, 16, device=device)
    audio = torch.randn(2, 16_000, device=device)
    start, length = torch.tensor([0.1, 0.5], device=device), torch.tensor([0.3, 0.2], device=device)
    donor = torch.arange(2, device=device)
    segments = ops.Segments(start, length, donor, start + 0.4)
    swapped = ops.Segments(start, start + 0.2, 1 - donor, start * 0.5)
    rate = torch.tensor([0.8, 1.25], device=device)
    rates = {"video_rate": 24.0, "audio_rate": 8000.0}

    def loss():
        value, stats = ops.dpo_loss(policy, reference, target, beta=[9.0, 9.0], return_stats=True)
        return [value.detach(), *stats, *torch.autograd.grad(value, policy)]

    def in_place():
        both = video.clone(), audio.clone()
        return list(ops.replace_segments(*both, swapped, crossfade=0.05, out=both, **rates))

    return {
        "dpo_loss": loss,
        "paired_noise": lambda: list(
            ops.paired_noise([x[:2] for x in clean], [x[2:] for x in clean], sigma, seed)
        ),
        "noise": lambda: [ops.noise((2, 5000), seed)],
        "scale": lambda: [ops.scale(video, rate)],
        "replace_segments": lambda: list(ops.replace_segments(video, audio, segments, **rates)),
        "replace_segments in place": in_place,
    }


# ---------------------------------------------------------------- the checks


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


def check_tests() -> str:
    files = [ROOT / "tests" / f"test_{room}.py" for room in ROOMS]
    parallel = ["-n", "6"] if find_spec("xdist") else []
    return _run([*PYTEST, *parallel, *files], LONGEST["tests"]).strip().splitlines()[-1]


def check_sanitizer(kind: str) -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "no compute-sanitizer here"
    command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--once"]
    # Each tensor in an allocation of its own, so that its bounds and its first writes are seen.
    _run(command, LONGEST["sanitizer"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return "nothing found"


def check_benchmark(file: Path, results: dict) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmarks.json"
        print(_run([*PYTEST, f"--benchmark-json={output}", file], LONGEST["benchmark"]))
        rows = json.loads(output.read_text())["benchmarks"]
    results["benchmarks"] |= {row["name"]: row["extra_info"] for row in rows}
    return f"{len(rows)} rows"


def _run(command: list, seconds: float, **environment: str) -> str:
    """Output of a command, run where the source tree does not hide the installed package."""
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    seconds = min(seconds, max(END - time.monotonic(), 1))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env=known | environment, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    text = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, f"{command[0]}: exit {done.returncode}\n{text}"
    return done.stdout


# ---------------------------------------------------------------- the command


def attempt(name: str, check: Callable[[], str], results: dict) -> None:
    start = time.perf_counter()
    try:
        outcome, passed = check(), True
    except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
        outcome, passed = str(error), False
    seconds = round(time.perf_counter() - start, 1)
    results["checks"][name] = {"passed": passed, "outcome": outcome, "seconds": seconds}
    print(f"{'ok  ' if passed else 'FAIL'} {name} ({seconds} s): {outcome}", flush=True)


def checks(sanitizer: bool, results: dict) -> Iterator[dict[str, Callable[[], str]]]:
    """What is checked, in steps; what shares a step runs side by side."""
    yield {"CUDA graphs": check_graphs}
    yield {"the same bits": check_bits}
    kinds = ("memcheck", "racecheck", "initcheck") if sanitizer else ()
    yield {"tests": check_tests} | {kind: partial(check_sanitizer, kind) for kind in kinds}
    for file in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        yield {file.stem: partial(check_benchmark, file, results)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check on a GPU what only a GPU can show.")
    parser.add_argument("--dry-run", action="store_true", help="one call of each op on the CPU")
    parser.add_argument("--once", action="store_true", help="one call of each op on the GPU")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>-<date>.json")
    arguments = parser.parse_args()
    if arguments.dry_run or arguments.once:
        for name, call in calls("cpu" if arguments.dry_run else "cuda").items():
            call()
            print(f"ok   {name}")
        return 0
    if not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run makes one call of each op on the CPU")

    gpu, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    results = {"gpu": gpu, "date": date, **versions, "checks": {}, "benchmarks": {}}
    print(gpu, versions, flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"{name}-{date}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    for step in checks(not arguments.skip_sanitizer, results):
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda item: attempt(*item, results), step.items()))
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {output}")
    return sum(not check["passed"] for check in results["checks"].values())


if __name__ == "__main__":
    sys.exit(main())
