"""What more than one op checks at its public door, and the choice between kernel and reference."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ANY_FLOAT = (*FLOATS, torch.float64)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_tensor(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype] | None = None,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise TypeError for a wrong kind or dtype, ValueError for a wrong shape or device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {expected}, got {got}")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a number, or a tensor that holds one on the host."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() != 1:
            got = f"shape {list(value.shape)} on {value.device}"
            raise TypeError(f"{name}: expected a number, or a tensor of one on the CPU, got {got}")
    elif not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def weight_of(name: str, value: object) -> float:
    """`value` as a float; ValueError unless it is finite and not negative."""
    number = value.item() if isinstance(value, Tensor) else float(value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number, 0 or more, got {number}")
    return number


def per_modality(name: str, value: object, count: int, *, shared: bool = False) -> list:
    """`value`, one entry or a sequence of them, as a list of `count` entries.

    `shared`: one entry stands for all modalities.
    """
    single = count if shared else 1
    entries = list(value) if isinstance(value, (list, tuple)) else [value] * single
    if len(entries) != count:
        raise ValueError(f"{name}: expected one entry per modality ({count}), got {len(entries)}")
    return entries


def check_impl(impl: str, device: torch.device) -> str:
    """Resolve `impl` for a Triton op to "kernel" or "reference".

    "auto" is the kernel on CUDA and the reference elsewhere; a kernel asked for by name runs on
    CUDA, or on CPU in Triton's interpreter, or it raises: there is no silent fallback.
    """
    check_choice("impl", impl, ("auto", "kernel", "reference"))
    if impl == "auto":
        return "kernel" if device.type == "cuda" else "reference"
    if impl == "kernel" and device.type != "cuda" and not _interpreted(device):
        raise ValueError(
            f"impl: 'kernel' expects CUDA tensors, got device {device}; "
            "on CPU it needs Triton's interpreter (TRITON_INTERPRET=1 before the first import)"
        )
    return impl


def _interpreted(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    import triton

    return triton.knobs.runtime.interpret
