"""Blocks of the frozen base in host memory, each brought to the device ahead of its use.

A block's frozen weights are swapped for copies on the device while its forward runs, and the next
block's copies are under way on a stream of their own: the following one going forward, the
preceding one where gradient checkpointing recomputes blocks going backward. What the backward needs
it holds itself: autograd keeps the copies that a block's forward saw until that block's backward is
done. So gradients are those of a base that never moved, bit for bit. What is trained stays on the
device.

diffusers' group offloading, which does this for sampling, moves whole blocks, the adapter within
them too, and copies ahead in the order of the forward alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from syncdpo.models.quantised import BLOCKS, parts_of

Slot = tuple[nn.Module, str]  # a module and the name of its parameter


def offload_blocks(transformer: nn.Module, device: torch.device) -> None:
    """Put the frozen weights of the blocks into host memory, everything else on `device`.

    Raises ValueError for a module without blocks.
    """
    blocks = [block for name in BLOCKS for block in getattr(transformer, name, ())]
    if not blocks:
        raise ValueError(
            f"offload: expected a transformer with {' or '.join(BLOCKS)}, got "
            f"{type(transformer).__name__}"
        )
    offloaded = OffloadedBlocks(blocks, device)
    for module, name in offloaded.slots():
        module._parameters[name] = None
    transformer.to(device)
    for index in range(len(offloaded.blocks)):
        offloaded.leave(index)


@dataclass
class Copies:
    """One block's frozen weights on the device, and the event after which they are whole."""

    weights: dict[Slot, nn.Parameter]
    ready: torch.cuda.Event | None


@dataclass
class OffloadedBlocks:
    """The hooks around each block, and what they share."""

    blocks: list[nn.Module]
    device: torch.device
    ahead: dict[int, Copies] = field(default_factory=dict)

    def __post_init__(self):
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.begun = None  # an event: all that was launched before the block at hand
        self.host = [self._send_away(block) for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(self.enter, index))
            # Also where a recomputation stops early, which it does by raising.
            block.register_forward_hook(partial(self.leave, index), always_call=True)

    def slots(self) -> list[Slot]:
        return [slot for weights in self.host for slot in weights]

    def _send_away(self, block: nn.Module) -> dict[Slot, nn.Parameter]:
        host = {}
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad:
                    module._parameters[name] = moved(parameter, self._to_host)
                    host[module, name] = module._parameters[name]
        return host

    def _to_host(self, tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory() if self.stream else tensor.cpu()

    def enter(self, index: int, *_) -> None:
        copies = self.ahead.pop(index, None) or self._fetch(index)
        self.ahead.clear()
        self._wait_for(copies)
        for (module, name), weight in copies.weights.items():
            module._parameters[name] = weight
        following = index - 1 if going_backward() else index + 1
        if 0 <= following < len(self.blocks):
            self.ahead[following] = self._fetch(following)

    def leave(self, index: int, *_) -> None:
        for (module, name), weight in self.host[index].items():
            module._parameters[name] = weight

    def _fetch(self, index: int) -> Copies:
        copy = partial(Tensor.to, device=self.device, non_blocking=True)
        if self.stream is None:
            return Copies({s: moved(p, copy) for s, p in self.host[index].items()}, None)
        with torch.cuda.stream(self.stream):
            weights = {slot: moved(p, copy) for slot, p in self.host[index].items()}
            return Copies(weights, self.stream.record_event())

    def _wait_for(self, copies: Copies) -> None:
        """The device waits for the copies, the host for the last block but one.

        Else the host would run ahead and ask for memory for copies of many blocks at once.
        """
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copies.ready)
        for weight in copies.weights.values():
            for part in parts_of(weight):
                part.record_stream(current)
        if self.begun is not None:
            self.begun.synchronize()
        self.begun = current.record_event()


def moved(parameter: nn.Parameter, move: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """The parameter with `move` applied to its data; scales of nf4 (2 %) stay where they are."""
    if hasattr(parameter, "__tensor_flatten__"):  # torchao's
        names, context = parameter.__tensor_flatten__()
        parts = {name: move(getattr(parameter, name)) for name in names}
        rebuilt = type(parameter).__tensor_unflatten__(
            parts, context, parameter.size(), parameter.stride()
        )
        return nn.Parameter(rebuilt, requires_grad=False)
    copy = torch.Tensor._make_subclass(type(parameter), move(parameter.data), False)
    copy.__dict__.update(parameter.__dict__)  # bitsandbytes keeps its scales there
    return copy


def going_backward() -> bool:
    """Whether the autograd engine runs this: where a checkpoint's forward is done once more."""
    return torch._C._current_graph_task_id() != -1
