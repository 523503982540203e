"""Files of torch.save from somebody else: read as tensors, numbers and containers, never run."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Unusable(ValueError):
    """A clip that cannot be used, for the reason given."""


def kind_of(value) -> str:
    """What a value is, in a few words, where a tensor of numbers was expected."""
    if isinstance(value, Tensor):
        layout = str(value.layout).removeprefix("torch.")
        return f"a tensor {list(value.shape)} ({value.device.type}, {layout}, {value.dtype})"
    return "None" if value is None else f"of type {type(value).__name__}"


class _NumpyType:
    """In the place of `numpy.dtype` in a pickle, so that none of numpy's own code is called."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(kind: _NumpyType, content: bytes) -> int | float | bool:
    """In the place of numpy's own function: a number as Python has it."""
    if not re.fullmatch(r"b1|[iuf]\d+", kind.name):
        raise pickle.UnpicklingError(f"numpy scalar of type {kind.name}")
    dtype = np.dtype(kind.order.replace("|", "=") + kind.name)
    value = np.frombuffer(content, dtype, count=1)[0]
    return float(value) if dtype.kind == "f" else value.item()


# numpy 1 and 2 write different names.
NUMPY_SCALARS = [
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_NumpyType, "numpy.dtype"),
]


def load_tensors(path: Path, root: Path) -> dict:
    """The content of a .pt file: tensors, numbers (numpy's too) and containers, nothing else."""
    name = path.relative_to(root).as_posix().removeprefix("latents/")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that then fail, and are named
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        raise _unreadable(path, name, error) from error
    if not isinstance(content, dict):
        raise Unusable(f"{name} holds no dict of tensors, it is {kind_of(content)}")
    return content


def _unreadable(path: Path, name: str, error: Exception) -> ValueError:
    """What keeps a file from being read: Unusable, or for a foreign object plain ValueError."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as reason:
        return Unusable(f"{name} cannot be opened ({reason.strerror})")
    if not head:
        return Unusable(f"{name} is empty")
    if head.startswith(b"version https://git-lfs"):
        return Unusable(f"{name} is a git-lfs pointer, not the file itself; run `git lfs pull`")
    if not head.startswith((b"PK", b"\x80")):
        return Unusable(f"{name} is not a file that torch.save wrote")
    if not isinstance(error, pickle.UnpicklingError):
        return Unusable(f"{name} is damaged")
    if "Unsupported operand" in str(error):
        return Unusable(f"{name} is damaged, or pickled by another protocol than torch.save's own")
    if re.search(r"\bnumpy\b", str(error)):
        return Unusable(f"{name} holds numpy arrays or objects, expected tensors and numbers")
    return ValueError(f"{path} is refused: it holds pickled objects other than tensors and numbers")
