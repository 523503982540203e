"""What several kernels share: launches, chunks, layouts, and noise from Philox and Box-Muller."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a sample per program, and its warps; never a function of the device. One pass of all
# threads over vectors of eight: what follows no sum is quickest in many short programs.
CHUNK = tl.constexpr(1024)
NUM_WARPS = 4
THREADS = tl.constexpr(32 * NUM_WARPS)

INTERPRETED = triton.knobs.runtime.interpret
APPROXIMATE = tl.constexpr(not INTERPRETED)  # the interpreter knows no inline assembly

# ---------------------------------------------------------------- launches, on the host

PLANS = 1024  # that each launcher remembers

Memory = tuple[torch.Size, tuple[int, ...], torch.dtype]


def memory(x: Tensor) -> Memory:
    """What a launch depends on of a tensor, its address aside: shape, strides, dtype."""
    return x.shape, x.stride(), x.dtype


class Plan:
    """The launch of a kernel on tensors of given shapes, strides and dtypes.

    For every call Triton looks at each argument to find the code that was compiled for its like,
    which takes longer than small tensors keep the device busy. All that it looks at is part of the
    plan, but for addresses: so the code is kept here, per device and per set of aligned addresses.
    """

    def __init__(
        self, kernel, programs: int, numbers: tuple, *, warps: int = NUM_WARPS, **constants
    ) -> None:
        self.kernel, self.grid, self.warps = kernel, (programs, 1, 1), warps
        self.numbers, self.constants = numbers, constants
        self.compiled = {}

    def launch(self, given: Sequence[Tensor], *arguments) -> None:
        """`arguments` in the kernel's order, all but its constants; `given`: the tensors among them
        that are not fresh memory, which is always aligned."""
        key = (given[0].device, *[x.data_ptr() % 16 == 0 for x in given])
        run = self.compiled.get(key)
        with torch.cuda.device_of(given[0]):
            if run is not None:
                run(*arguments, *self.constants.values())
                return
            compiled = self.kernel[self.grid](
                *arguments, **self.constants, num_warps=self.warps, enable_fp_fusion=True
            )
            if compiled is not None:  # as from the interpreter
                self.compiled[key] = compiled[self.grid]


# ---------------------------------------------------------------- layouts, on the host


class Layout(NamedTuple):
    """How the samples of several tensors of one shape lie in memory.

    `count` elements per sample along axes of `sizes`, merged where all the tensors allow it. Per
    tensor: `rows`, the stride from sample to sample; `strides`, those of the axes; `align`, how
    many elements, from a multiple of it on, are sure to be contiguous and aligned.
    """

    count: int
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    vec: int
    rowwise: bool
    align: tuple[int, ...]
    wide: bool

    def chunks(self, size: tl.constexpr) -> int:
        return triton.cdiv(self.count, size.value)

    def even(self, size: tl.constexpr) -> bool:
        return self.count % size.value == 0


def layout(tensors: Sequence[Memory], *, ordered: bool) -> Layout:
    """The layout of `tensors`; unless `ordered`, the axes go in the order of the first's memory."""
    shape, first, _ = tensors[0]
    axes = [axis for axis in range(1, len(shape)) if shape[axis] > 1]
    if not ordered:
        axes.sort(key=lambda axis: -first[axis])
    sizes, steps = [], []
    for axis in axes:
        size, step = shape[axis], [stride[axis] for _, stride, _ in tensors]
        if sizes and steps[-1] == [s * size for s in step]:
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            steps.append(step)
    sizes, steps = sizes or [1], steps or [[1] * len(tensors)]
    vec = 8 if any(dtype.itemsize == 2 for _, _, dtype in tensors) else 4
    strides = tuple(zip(*steps, strict=True))
    inner = [sizes[-1]] if len(sizes) > 1 else []
    reach = [sum((n - 1) * s for n, s in zip(sizes, own, strict=True)) for own in strides]
    return Layout(
        count=math.prod(sizes),
        sizes=tuple(sizes),
        rows=tuple(stride[0] for _, stride, _ in tensors),
        strides=strides,
        vec=vec,
        rowwise=math.gcd(vec, *inner) == vec,
        align=tuple(
            math.gcd(vec, stride[0], *own[:-1], *inner) if own[-1] == 1 else 1
            for (_, stride, _), own in zip(tensors, strides, strict=True)
        ),
        wide=max(*reach, math.prod(sizes)) >= 2**31,
    )


# ---------------------------------------------------------------- offsets, on the device


@triton.jit
def chunk_start(i_chunk, chunk: tl.constexpr, wide: tl.constexpr):
    """The logical index of a chunk's first element."""
    return i_chunk.to(tl.int64 if wide else tl.int32) * chunk


@triton.jit
def blocks(
    first, count, chunk: tl.constexpr, threads: tl.constexpr, vec: tl.constexpr, even: tl.constexpr
):
    """How many blocks of [threads, vec] the chunk that starts at `first` has."""
    number = chunk // (threads * vec)
    if not even:
        left = tl.minimum(count - first, chunk).to(tl.int32)
        number = tl.cdiv(left, threads * vec)
    return number


@triton.jit
def offsets(start, lane, sizes, strides, rowwise: tl.constexpr, align: tl.constexpr):
    """Where elements start [threads, 1] + lane [1, VEC] lie in a sample of collapsed axes.

    `rowwise`: a vector never crosses a row of the last axis, so only its start is divided.
    """
    index = start if rowwise else start + lane
    offset = index * 0
    for axis in tl.static_range(len(sizes) - 1, 0, -1):
        offset += index % sizes[axis] * strides[axis]
        index = index // sizes[axis]
    offset += index * strides[0]
    if rowwise:
        offset += lane * strides[len(sizes) - 1]
    if align > 1:
        offset = tl.multiple_of(tl.max_contiguous(offset, [1, align]), [1, align])
    return offset


@triton.jit
def row_start(pointer, i_row, stride, align: tl.constexpr):
    """Where a sample begins; 64 bits, so that batches beyond 2³¹ elements survive."""
    return pointer + tl.multiple_of(i_row.to(tl.int64) * stride, align)


@triton.jit
def load(pointer, inside, even: tl.constexpr):
    """float32, 0 beyond the sample's end; `even` samples have none within a chunk."""
    if even:
        block = tl.load(pointer, eviction_policy="evict_first")
    else:
        block = tl.load(pointer, inside, 0.0, eviction_policy="evict_first")
    return block.to(tl.float32)


@triton.jit
def store(pointer, value, inside, even: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if even:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, inside)


# ---------------------------------------------------------------- noise


@triton.jit
def philox(counter, stream, key_low, key_high):
    """Philox4x32-10 of (counter, 0, 0, stream): four uint32 words."""
    c0 = counter.to(tl.uint32)
    c1 = tl.zeros_like(c0)
    c2 = c1
    c3 = (c1 + stream).to(tl.uint32)
    for _ in tl.static_range(10):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ key_low
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ key_high
        c1 = odd.to(tl.uint32)
        c3 = even.to(tl.uint32)
        key_low = (key_low + 0x9E3779B9).to(tl.uint32)
        key_high = (key_high + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _approximate(instruction: tl.constexpr, x):
    return tl.inline_asm_elementwise(
        instruction + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two normals from two words: −2 ln u = −2 ln 2 · lg2 u, u in (0, 1]; the angle in [−π, π)."""
    uniform = tl.fma(radius_bits.to(tl.float32), 2.0**-32, 2.0**-33)
    angle = angle_bits.to(tl.int32, bitcast=True).to(tl.float32) * ANGLE_PER_BIT
    if APPROXIMATE:
        squared = tl.maximum(_approximate("lg2", uniform) * MINUS_TWO_LN_TWO, 0.0)
        radius = _approximate("sqrt", squared)
        cosine, sine = _approximate("cos", angle), _approximate("sin", angle)
    else:
        radius = tl.sqrt(tl.maximum(tl.log2(uniform) * MINUS_TWO_LN_TWO, 0.0))
        cosine, sine = tl.cos(angle), tl.sin(angle)
    return radius * cosine, radius * sine


ANGLE_PER_BIT = tl.constexpr(math.pi * 2.0**-31)
MINUS_TWO_LN_TWO = tl.constexpr(-2.0 * math.log(2.0))


@triton.jit
def normals(start, stream, seed, threads: tl.constexpr, vec: tl.constexpr):
    """ε of the elements start [threads] + 0 … vec − 1, where start is a multiple of vec.

    A thread keeps its own vector: counters joined any other way would cross threads.
    """
    key_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_high = (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    counter = start // 4
    w0, w1, w2, w3 = philox(counter, stream, key_low, key_high)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    if vec == 8:
        w0, w1, w2, w3 = philox(counter + 1, stream, key_low, key_high)
        n4, n5 = box_muller(w0, w1)
        n6, n7 = box_muller(w2, w3)
        n0, n1 = tl.join(n0, n4), tl.join(n1, n5)
        n2, n3 = tl.join(n2, n6), tl.join(n3, n7)
    quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(quads, [threads, vec])
