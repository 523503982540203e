"""Launches up to the driver, without a GPU: what would reach the device is what was meant.

Triton finds the code that fits the arguments, flattens their tuples, leaves out what is compiled in
and packs the rest in C; our launchers keep the code and pass arguments straight to it. Both end in
`cuLaunchKernelEx`, here that of `native/fake_libcuda.c`, which reads the parameters as a driver
would: by the table in the kernel's cubin. Every launch that `compile_every_option.py` knows, and
those of the noise and the warp, go there on tensors without memory, each with an address.

All that happens in a process of its own, where the fake is libcuda.so.1: `python
tests/ops/test_launch_path.py`, with the environment that `launched` gives it.
"""

import ctypes
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from processes import PYTHONPATH
from torch import Tensor

FAKE = Path(__file__).parents[1] / "native" / "fake_libcuda.c"
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
MOST_PARAMETERS = 512  # as in the fake
DEVICE_START = 1 << 40
STREAM = 0x5EED
# What is launched again with tensors that begin at odd elements. Other code fits them.
MOVED = ("mask", "rebuilt and shared", "noise", "warp")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"
)

# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Per launch of the table, and per call of it: kernel → how its code was found."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the fake driver, as Triton does for its launchers")
    folder = tmp_path_factory.mktemp("fake")
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{INCLUDE}", "-o", library]
    subprocess.run([compiler, "-Wall", "-Werror", "-O1", *options, FAKE], check=True, timeout=60)
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),  # nothing that was linked to the fake may stay
        "DISABLE_PTXAS_OPT": "1",  # it takes a third of the time, and no parameter depends on it
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": PYTHONPATH,
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve()], env=environment, capture_output=True,
        text=True, timeout=600, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_launch_reaches_the_driver_as_it_was_meant(launched):
    """What was meant is checked launch by launch, in `Watch.check`."""
    kernels = {kernel for calls in launched.values() for call in calls for kernel in call}
    assert kernels == {
        "_forward_kernel", "_backward_kernel", "_noise_kernel", "_paired_noise_kernel",
        "warp_kernel",
    }  # fmt: skip
    assert {len(calls) for name, calls in launched.items() if name not in MOVED} == {2}
    assert {len(launched[name]) for name in MOVED} == {4}
    assert all(calls and all(calls) for calls in launched.values())


def test_a_second_launch_runs_the_code_that_is_kept(launched):
    for name, calls in launched.items():
        for first, second in zip(calls[::2], calls[1::2], strict=True):
            assert first.keys() == second.keys(), name
            assert set(second.values()) == {"kept"}, name


def test_other_code_fits_moved_tensors(launched):
    for name in MOVED:
        assert set(launched[name][2].values()) == {"found"}, name


# ---------------------------------------------------------------- the driver, from its other side


class Launch(ctypes.Structure):
    """`struct launch` of the fake."""

    _fields_ = (
        ("name", ctypes.c_char * 96),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("size", ctypes.c_uint32 * MOST_PARAMETERS),
        ("value", ctypes.c_uint8 * 8 * MOST_PARAMETERS),
    )

    def parameters(self) -> list[bytes]:
        return [bytes(self.value[i])[: self.size[i]] for i in range(self.count)]


class Addresses:
    """An address for every tensor without memory, as `Tensor.data_ptr`: its storage's, which begins
    where no other does, and its place in there."""

    def __init__(self) -> None:
        self.next, self.storages, self.real = DEVICE_START, {}, Tensor.data_ptr

    def __call__(self, x: Tensor) -> int:
        if x.device.type != "meta":
            return self.real(x)
        storage = x.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = self.next, storage  # kept: so nobody else gets its key
            self.next += -(-max(storage.nbytes(), 1) // 512) * 512
        return self.storages[storage._cdata][0] + x.storage_offset() * x.element_size()


def fake_driver():
    """Triton's own driver, but for what it asks torch about the device."""
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: STREAM
    driver.get_device_capability = lambda device: (9, 0)
    return driver


# ---------------------------------------------------------------- what was meant


class Watch:
    """Between the launchers and Triton: after each launch, what the driver got of it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.launches = ctypes.c_uint64.in_dll(library, "launches")
        self.last = Launch.in_dll(library, "last")
        self.found = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Watch code that Triton finds, and code that somebody keeps and calls."""
        from triton.compiler import CompiledKernel
        from triton.runtime.jit import JITFunction

        run, take = JITFunction.run, CompiledKernel.__getitem__

        def find_and_run(kernel, *given, grid, warmup, **named):
            before = self.launches.value
            compiled = run(kernel, *given, grid=grid, warmup=warmup, **named)
            given = [*given, *(named[name] for name in kernel.arg_names[len(given) :])]
            self.check("found", compiled, grid, given, before)
            return compiled

        def keep(compiled, grid):
            kept = take(compiled, grid)

            def run_kept(*given):
                before = self.launches.value
                kept(*given)
                self.check("kept", compiled, grid, given, before)

            return run_kept

        patch.setattr(JITFunction, "run", find_and_run)
        patch.setattr(CompiledKernel, "__getitem__", keep)

    def check(self, way: str, compiled, grid: tuple, given: list, before: int) -> None:
        """`given`: the kernel's arguments in its order, constants among them."""
        kernel, last = compiled.src.fn, self.last
        assert self.launches.value == before + 1
        assert last.name.decode() == compiled.name == kernel.__name__
        assert list(last.grid) == [*grid, 1, 1][:3]
        assert list(last.block) == [32 * compiled.metadata.num_warps, 1, 1]
        assert (last.shared, last.stream) == (compiled.metadata.shared, STREAM)
        assert last.attributes == 0
        check_that_code_fits(compiled, given)
        assert len(given) == len(kernel.params)
        meant = [
            value
            for parameter, argument in zip(kernel.params, given, strict=True)
            if not parameter.is_constexpr
            for value in packed(argument, folded=not parameter.do_not_specialize)
        ]
        scratch = [bytes(8)] * 2  # Triton's own, which these kernels do not use
        got = last.parameters()
        assert got == meant + scratch, f"{kernel.__name__}: meant {meant}, got {got}"
        self.found[kernel.__name__] = way


def check_that_code_fits(compiled, given: list) -> None:
    """What was compiled in is what is given, and what is sure to be a multiple of 16 is one."""

    def at(path):
        value = given
        for place in path:
            value = value[place]
        return value

    for path, constant in compiled.src.constants.items():
        assert at(path) == getattr(constant, "value", constant), (path, at(path), constant)
    for path, attributes in compiled.src.attrs.items():
        for name, divisor in attributes:
            assert name == "tt.divisibility"
            value = at(path)
            number = value.data_ptr() if isinstance(value, Tensor) else value
            assert number % divisor == 0, (path, number)


def packed(argument, *, folded: bool) -> Iterator[bytes]:
    """As the device reads it, in order; `folded`: a 1 is compiled in."""
    if isinstance(argument, tuple):
        for entry in argument:
            yield from packed(entry, folded=folded)
    elif isinstance(argument, Tensor):
        yield struct.pack("<Q", argument.data_ptr())
    elif isinstance(argument, float):
        yield struct.pack("<f", argument)
    elif argument != 1 or not folded:
        yield struct.pack("<i" if -(2**31) <= argument < 2**31 else "<q", argument)


# ---------------------------------------------------------------- the process


def launches(table) -> dict:
    """Every launch of compile_every_option.py, and those of the kernels that it leaves out."""
    from syncdpo.kernels.temporal_warp import warp_fwd

    def warp(*shape: int, dim: int, knots: int, dtype=torch.float32, boundary="edge"):
        x = table.sass.empty(*shape, dtype=dtype)
        warp_fwd(x, table.sass.empty(shape[0], knots), dim, boundary)

    def noise_alone(*shape: int, stream: int):
        seed = table.sass.empty(shape[0], dtype=torch.int64)
        table.paired_noise._noise(shape, seed, stream)

    def one_of_everything(mean: bool):
        """One pair of one element: counts and strides of 1 are compiled in, as constants."""
        x, slope = [table.sass.empty(2, 1)], table.sass.empty(1, 2)
        options = {"beta": [1.0], "stream": [1], "sign": [1], "mean": mean, "stats": True}
        options = SimpleNamespace(**table.PLAIN | options)
        seed, grad = [table.sass.empty(1, dtype=torch.int64)], table.sass.empty(*[1] * (not mean))
        table.dpo_loss._fwd(x, x, x, seed, [None], None, None, options)
        table.dpo_loss._bwd(grad, slope, x, x, seed, [None], options)
        table.paired_noise._paired_noise([x[0][:1]], [None], [grad.expand(1)], seed[0], 1)

    return table.LAUNCHES | {
        "one of everything": lambda: one_of_everything(mean=True),
        "one of everything, not averaged": lambda: one_of_everything(mean=False),
        "noise alone": lambda: noise_alone(4, 8, 16, stream=2),
        "noise alone, last stream": lambda: noise_alone(3, 35, stream=2**32 - 1),
        "noise alone, stream 1": lambda: noise_alone(1, 4096, stream=1),
        "warp": lambda: warp(4, 31, 16, 24, dim=1, knots=65, dtype=torch.bfloat16),
        "warp, one sample": lambda: warp(1, 1, 33, 1, dim=2, knots=9),
        "warp, two knots": lambda: warp(4, 31, 16, dim=1, knots=2),
        "warp, two frames": lambda: warp(3, 2, 16, dim=1, knots=2),
        "warp, time last": lambda: warp(2, 3, 50, dim=2, knots=2, boundary="wrap"),
        "warp, a knot per frame": lambda: warp(2, 50, 32, dim=1, knots=50, boundary="reflect"),
        "warp, beyond 2³¹ elements": lambda: warp(2, 70_000, 40_000, dim=1, knots=40_000),
    }


def moved(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without memory, too, and one element behind where it should begin."""
    return torch.empty(math.prod(shape) + 1, dtype=dtype, device="meta")[1:].view(shape)


def main() -> None:
    library = ctypes.CDLL("libcuda.so.1")
    watch, addresses = Watch(library), Addresses()
    triton.runtime.driver.set_active(fake_driver())
    import compile_every_option as table

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "data_ptr", lambda x: addresses(x))
        watch.install(patch)
        for name, launch in launches(table).items():
            found[name] = []
            with pytest.MonkeyPatch.context() as elsewhere:
                for call in range(4 if name in MOVED else 2):
                    if call == 2:
                        elsewhere.setattr(table.sass, "empty", moved)
                    watch.found = {}
                    launch()
                    found[name].append(watch.found)
        # The driver is asked about every pointer, so what is no device memory goes nowhere.
        with pytest.raises(ValueError, match="cpu tensor"):
            table.paired_noise._noise((2, 8), torch.arange(2), 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
