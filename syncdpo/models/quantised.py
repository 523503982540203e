"""A frozen module in fewer bits: its linear layers are quantised in place, one after the other.

    int8, fp8   w ≈ s_row · q     torchao; a float32 scale for each row of the weight
    nf4         w ≈ s_block · q   bitsandbytes; q of 4 bits, scales of blocks of 64 in 8 bits

Only one layer exists twice at any time: a layer goes to the device, is quantised there, and its
full weight is let go. Activations stay as they are; a product multiplies by the dequantised weight
and its backward does too, so gradients pass through to adapters. Embeddings, norms, gates of
attentions and whatever the module's class asks to be kept precise are left alone.

fp8 by diffusers' layerwise casting trains as well, but knows no scales: of a weight from
N(0, 1/4096) it loses 3.9 %, rows with a scale lose 2.7 %, int8 0.8 %, nf4 9.2 %.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

PRECISIONS = ("bf16", "fp8", "int8", "nf4")
LIBRARIES = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}
# Where a diffusers transformer has its blocks, in the order in which they run (LTX-2 the last one,
# Kandinsky 6 the others): nothing else is quantised.
BLOCKS = (
    "video_text_transformer_blocks", "audio_text_transformer_blocks", "visual_transformer_blocks",
    "transformer_blocks",
)  # fmt: skip
PRECISE = ("norm", "embed", "lm_head", "to_gate_logits", "lora_")
NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256  # weights that share a scale; scales that share theirs


def quantise(
    module: nn.Module,
    precision: str,
    device: torch.device | str = "cpu",
    *,
    setting: str = "base_precision",
) -> None:
    """Quantise the linear layers of `module` in place; they end up on `device`, frozen.

    precision: "bf16" leaves all as it is. setting: the name that an error gives to `precision`.
    Raises ValueError where the library is missing, does not run on `device`, or finds no layer.
    """
    if precision == "bf16":
        return
    check_runs(precision, device, setting=setting)
    layers = quantisable(module)
    if not layers:
        raise ValueError(
            f"{setting}: expected linear layers with whole weights to quantise to {precision}, "
            f"got none in {type(module).__name__}"
        )
    for name in list(layers):
        parent, _, last = name.rpartition(".")
        layer = layers.pop(name)  # whose full weight nothing may hold any longer
        setattr(module.get_submodule(parent), last, _quantised(layer.to(device), precision))


def quantisable(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers that `quantise` takes, by name: of a transformer's blocks, else of all."""
    kept = [*PRECISE, *_kept_precise(module)]
    within = tuple(f"{name}." for name in BLOCKS if hasattr(module, name)) or ("",)
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear
        and layer.weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and type(layer.weight.data) is Tensor
        and name.startswith(within)
        and not any(re.search(pattern, name) for pattern in kept)
    }


def stored_bytes(shape: tuple[int, int], precision: str) -> int:
    """What the quantised weight [out, in] of one layer takes, with its scales and tables."""
    rows, columns = shape
    if precision in ("int8", "fp8"):
        return rows * columns + rows * (5 if precision == "int8" else 4)  # its zero is stored too
    scales = math.ceil(rows * columns / NF4_BLOCK)
    tables = 4 * (16 + 256 + 1)  # the values of 4 bits, those of the scales' 8 bits, their mean
    second = 4 * math.ceil(scales / NF4_SECOND_BLOCK)
    return math.ceil(rows * columns / 2) + scales + second + tables


def scale_bytes(shape: tuple[int, int], precision: str) -> int:
    """The part of `stored_bytes` that is apart from the weight itself: nf4's scales and tables."""
    held = stored_bytes(shape, precision)
    return held - math.ceil(math.prod(shape) / 2) if precision == "nf4" else 0


def bytes_held(module: nn.Module) -> int:
    """Bytes of all that a module's parameters and buffers hold, each storage once."""
    storages = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in parts_of(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantised one consists of; a plain one itself."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from parts_of(getattr(tensor, name))
        return
    yield tensor
    if state := getattr(tensor, "quant_state", None):  # bitsandbytes'
        tables = [state.absmax, state.code, state.offset]
        if state.state2 is not None:
            tables += [state.state2.absmax, state.state2.code]
        yield from (table for table in tables if isinstance(table, Tensor))


def dequantised(layer: nn.Linear) -> Tensor:
    """The weight that a quantised layer multiplies by, in full."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight.detach()


def check_runs(
    precision: str, device: torch.device | str, *, setting: str = "base_precision"
) -> None:
    """Raises ValueError where `precision` needs a library that is missing, or fails on `device`."""
    library = LIBRARIES[precision]
    try:
        # Both products of training, forward and backward, of one small layer.
        layer = nn.Linear(64, 64).to(device, torch.bfloat16).requires_grad_(False)
        with torch.enable_grad():
            x = torch.ones(2, 3, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
            _quantised(layer, precision)(x).sum().backward()
    except ImportError as error:
        raise ValueError(
            f"{setting}: {precision} needs {library}, which cannot be imported ({error}): "
            "pip install 'syncdpo[quant]'"
        ) from error
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{setting}: {precision} by {library} does not run on {device} "
            f"({str(error).splitlines()[0]}); pip install -U 'syncdpo[quant]', or choose another"
        ) from error


def _quantised(layer: nn.Linear, precision: str) -> nn.Linear:
    if precision == "nf4":
        return _nf4(layer)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # peft's, for whoever merges a LoRA into such a layer; a base that is trained against stays.
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
    # Without the last option torchao changes how all float32 products are computed.
    config = (
        Int8WeightOnlyConfig(version=2, set_inductor_config=False)
        if precision == "int8"
        else Float8WeightOnlyConfig(set_inductor_config=False)
    )
    quantize_(layer, config)
    return layer.requires_grad_(False)


def _nf4(layer: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight.detach()
    # Named, for else the first input decides, which may be a float32 one.
    found = Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=weight.dtype,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    found.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=found).to(
        weight.device
    )
    found.bias = layer.bias
    # On a CPU it would pack weights otherwise for inference: one more rounding, not for all shapes.
    found.support_avx512bf16_for_cpu = False
    return found.requires_grad_(False).train(layer.training)


def _kept_precise(module: nn.Module) -> Iterator[str]:
    """What the module's class says of its own layers, in diffusers' and transformers' words."""
    for name in ("_skip_layerwise_casting_patterns", "_keep_in_fp32_modules"):
        yield from getattr(module, name, None) or ()
