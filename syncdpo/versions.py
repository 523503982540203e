"""Which versions of the libraries beneath work, and a sentence where others fail to import."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType

# Both ends were tried; pyproject.toml asks for the same.
WANTED = {"diffusers": ">=0.41,<0.43", "transformers": ">=5.10.1,<5.25"}
BENEATH = (*WANTED, "peft", "accelerate", "huggingface_hub", "tokenizers", "safetensors")
# Who warns on import, with the extra [quant], of what nothing here makes use of: faster products of
# 4 bits on CPUs, checkpoints that torchao wrote, how torchao registers its enums.
BESIDE_THE_POINT = (
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
)


class WrongVersions(ImportError):
    """A library beneath cannot be imported, or lacks what is asked of it."""


@contextlib.contextmanager
def checked_versions() -> Iterator[None]:
    """Turns an import that fails inside the libraries beneath into `WrongVersions`."""
    for name in BESIDE_THE_POINT:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except WrongVersions:
        raise
    except (ImportError, RuntimeError) as error:
        if not _failed_import(error):
            raise
        raise WrongVersions(_sentence(error)) from error


def _failed_import(error: Exception) -> bool:
    """Whether an import failed, and inside the libraries beneath or of one of them."""
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        return package in BENEATH or _passes_through(error.__traceback__)
    # diffusers and transformers import lazily, and wrap what goes wrong.
    return str(error).startswith("Failed to import")


def _passes_through(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] in BENEATH:
            return True
        traceback = traceback.tb_next
    return False


def _sentence(error: Exception) -> str:
    found = {name: _found(name) for name in WANTED}
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Where a lazy import failed, the first line names the module, the second what went wrong.
    reason = next((line for line in lines if "look up to see" not in line), lines[0])
    return (
        "versions: expected "
        + ", ".join(f"{name} {wanted}" for name, wanted in WANTED.items())
        + ", got "
        + ", ".join(f"{name} {number}" for name, number in found.items())
        + f" ({reason}); pip install "
        + " ".join(f"'{name}{wanted}'" for name, wanted in WANTED.items())
    )


def _found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
