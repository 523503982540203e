"""What this installation is and what runs where: the text of `syncdpo info`."""

import platform
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from syncdpo import __version__


def describe() -> str:
    """Versions, how the native extension was built, and which implementation each op runs."""
    native = _native()
    sections = [
        [
            ("syncdpo", __version__),
            ("Python", platform.python_version()),
            ("torch", f"{torch.__version__}, {_torch_cuda()}"),
            ("Triton", _version_of("triton") or "not installed"),
        ],
        [
            ("native extension", "built" if native else "missing: install with `pip install .`"),
            ("its CUDA kernels", _cuda_build(native)),
            ("CUDA devices", _devices()),
        ],
        [
            ("on CPU", _on_cpu(native)),
            ("on CUDA", _on_cuda(native)),
        ],
    ]
    return "\n\n".join(
        "\n".join(f"{name:<18}{value}" for name, value in section) for section in sections
    )


def _native() -> ModuleType | None:
    try:
        from syncdpo import _C
    except ImportError:
        return None
    return _C


def _version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _torch_cuda() -> str:
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _cuda_build(native: ModuleType | None) -> str:
    if native is None or native.cuda_version is None:
        return "not built: there was no working nvcc, or SYNCDPO_CUDA=OFF"
    machine_code = ", ".join(native.cuda_architectures)
    return f"built by CUDA {native.cuda_version} for {machine_code}"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in names)


def _on_cpu(native: ModuleType | None) -> str:
    replace = "C++ kernel" if native else "reference only"
    return f"replace_segments: {replace}; warp, paired_noise, dpo_loss: PyTorch reference"


def _on_cuda(native: ModuleType | None) -> str:
    replace = "CUDA kernel" if native and native.cuda_version else "reference only"
    others = "Triton kernels" if _version_of("triton") else "PyTorch reference only"
    return f"replace_segments: {replace}; warp, paired_noise, dpo_loss: {others}"
