"""Everything that only a GPU can show, in one command of under ten minutes.

    python benchmarks/gpu_check.py [--dry-run] [--skip-sanitizer] [--output FILE]

In turn: the tests of the ops on CUDA (kernels against references, opcheck, torch.compile); each op
captured in a CUDA graph and replayed; the same bits from run to run and under load; the peak memory
from clean latents to gradient; compute-sanitizer over one call of each op; the benchmarks. The
results go to benchmarks/results/<gpu>-<date>.json; the exit code is the number of failed checks.

It needs no network. To install on such a machine: pip install --no-build-isolation --no-deps .
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
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from syncdpo import ops
from syncdpo.testing import predictions

ROOT = Path(__file__).parent.parent
OPS = ("dpo_loss", "paired_noise", "temporal_warp", "segment_replace")
TESTS = [ROOT / "tests" / f"test_{op}.py" for op in OPS]
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
    rate = torch.tensor([0.8, 1.25], device=device)

    def loss():
        value, stats = ops.dpo_loss(policy, reference, target, beta=[9.0, 9.0], return_stats=True)
        return [value.detach(), *stats, *torch.autograd.grad(value, policy)]

    return {
        "dpo_loss": loss,
        "paired_noise": lambda: list(
            ops.paired_noise([x[:2] for x in clean], [x[2:] for x in clean], sigma, seed)
        ),
        "noise": lambda: [ops.noise((2, 5000), seed)],
        "scale": lambda: [ops.scale(video, rate)],
        "replace_segments": lambda: list(
            ops.replace_segments(video, audio, segments, video_rate=24.0, audio_rate=8000.0)
        ),
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


def check_memory() -> str:
    """With Velocity nothing but x_t and the gradient is allocated, to 5 %."""
    batch, shapes = 4, ((8, 8192, 128), (8, 126, 128))
    policy, reference, clean = predictions(*shapes, dtype=torch.bfloat16, device="cuda")
    policy = [p.requires_grad_() for p in policy]
    seed, sigma = torch.arange(batch, device="cuda"), torch.rand(batch, device="cuda")

    def step():
        halves = [[x.chunk(2)[half] for x in clean] for half in (0, 1)]
        noisy = ops.paired_noise(*halves, sigma, seed)
        target = [ops.Velocity(x, seed, stream) for stream, x in enumerate(clean)]
        value = ops.dpo_loss(policy, reference, target, beta=[9.0, 9.0])
        return noisy, torch.autograd.grad(value, policy)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    least = sum(x.numel() * x.element_size() for tensors in results for x in tensors)
    assert peak <= 1.05 * least, f"peak {peak} bytes, x_t and gradient {least}"
    return f"peak {peak / least:.3f} of x_t and gradient"


def check_tests() -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    return _last_line(_run(command, environment))


def check_sanitizer() -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "no compute-sanitizer here"
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            kind,
            "--error-exitcode",
            "9",
            sys.executable,
            __file__,
            "--once",
        ]
        _run(command, environment)
    return "memcheck and racecheck found nothing"


def check_benchmarks(results: dict) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmarks.json"
        options = ["-q", "-p", "no:cacheprovider", "-o", "python_files=bench_*.py"]
        command = [sys.executable, "-m", "pytest", *options, f"--benchmark-json={output}"]
        text = _run([*command, ROOT / "benchmarks"], dict(os.environ))
        for row in json.loads(output.read_text())["benchmarks"]:
            results["benchmarks"][row["name"]] = row["extra_info"]
    print(text)
    return f"{len(results['benchmarks'])} rows"


def _run(command: list, environment: dict) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[0]}: exit {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


# ---------------------------------------------------------------- the command


def attempt(name: str, check: Callable[[], str], results: dict) -> None:
    start = time.perf_counter()
    try:
        outcome, passed = check(), True
    except (AssertionError, RuntimeError) as error:
        outcome, passed = str(error), False
    seconds = round(time.perf_counter() - start, 1)
    results["checks"][name] = {"passed": passed, "outcome": outcome, "seconds": seconds}
    print(f"{'ok  ' if passed else 'FAIL'} {name} ({seconds} s): {outcome}", flush=True)


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
    attempt("CUDA graphs", check_graphs, results)
    attempt("the same bits", check_bits, results)
    attempt("peak memory", check_memory, results)
    attempt("tests", check_tests, results)
    if not arguments.skip_sanitizer:
        attempt("compute-sanitizer", check_sanitizer, results)
    attempt("benchmarks", lambda: check_benchmarks(results), results)

    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"{name}-{date}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {output}")
    return sum(not check["passed"] for check in results["checks"].values())


if __name__ == "__main__":
    sys.exit(main())
