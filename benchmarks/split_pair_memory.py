"""What `split_pair` saves, measured: `python benchmarks/split_pair_memory.py`, about a minute.

The peak of live tensor bytes during SyncDPO's gradient over the clip's length, one pair, with and
without `split_pair` and `gradient_checkpointing`: a small LTX-2 with random weights, on the CPU, in
float32. Counted are results of operators while they live; weights and inputs are not, nor what an
operator needs for itself alone. Time is that of the processor, on one thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from syncdpo.models.ltx2 import LTX2
from syncdpo.negatives.curriculum import curriculum
from syncdpo.train import Learner, policy_and_reference
from syncdpo.training.config import TrainConfig
from syncdpo.training.dice import Dice, Order

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny_ltx2 import save_tiny_ltx2

FPS, SIZE = 24, 256  # pictures per second, pixels
PICTURES = (49, 121, 241)
LAYERS, TEXT_TOKENS = 8, 1024
CONFIG = TrainConfig(method="syncdpo", batch_size=1, lora_rank=4, rules="shift")


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until they are freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = size = storage.nbytes()
        weakref.finalize(storage, self._freed, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = save_tiny_ltx2(Path(name))
        small = LTX2VideoTransformer3DModel.load_config(folder / "transformer")
        deeper = LTX2VideoTransformer3DModel.from_config(small | {"num_layers": LAYERS})
        deeper.save_pretrained(folder / "transformer")
        model = LTX2(folder, frames=PICTURES[0], height=SIZE, width=SIZE, device="cpu")
        policy, _ = policy_and_reference(CONFIG, model)
        print_table(model, policy)


def print_table(model: LTX2, policy: LTX2VideoTransformer3DModel) -> None:
    """One row per length: MB whole and split, without and with checkpoints; the times' ratio."""
    print("| clip | S | MB | `split_pair` | | checkpoints, MB | `split_pair` | | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for pictures in PICTURES:
        model.set_format(pictures, SIZE, SIZE, FPS)
        cells, times = [], []
        for checkpointing in (False, True):
            set_checkpointing = policy.enable_gradient_checkpointing
            if not checkpointing:
                set_checkpointing = policy.disable_gradient_checkpointing
            set_checkpointing()
            whole, split = (measure(model, policy, split_pair) for split_pair in (False, True))
            cells += [f"{whole[0]:.0f}", f"{split[0]:.0f}", f"{split[0] / whole[0]:.2f}"]
            times.append(split[1] / whole[1])
        tokens = model.timelines[0].frames * model.timelines[0].tokens
        ratio = " / ".join(f"{value:.2f}" for value in times)
        print(f"| {pictures / FPS:.1f} s | {tokens:,} | {' | '.join(cells)} | {ratio} |")


def measure(model: LTX2, policy: torch.nn.Module, split_pair: bool) -> tuple[float, float]:
    """(peak in MB, seconds) of one gradient; the latter the best of three, without counting."""
    config, accelerator = replace(CONFIG, split_pair=split_pair), Accelerator(cpu=True)
    dice = Dice(
        config, model, curriculum("linear"), Order(config, 1, accelerator), torch.device("cpu")
    )
    learner, roll = Learner(config, accelerator, model, policy, None, False), dice.roll(0, 0)
    with LiveBytes() as memory:
        learner.backward(random_batch(model), roll)
    seconds = []
    for _ in range(3):
        policy.zero_grad()
        batch, since = random_batch(model), time.process_time()
        learner.backward(batch, roll)
        seconds.append(time.process_time() - since)
    return memory.peak / 1e6, min(seconds)


def random_batch(model: LTX2) -> dict[str, Tensor]:
    """One clip's latents and text."""
    video, audio = (line.frames * line.tokens for line in model.timelines)
    config = model.config
    shapes = {
        "video": (video, config["in_channels"]),
        "audio": (audio, config["audio_in_channels"]),
        "video_text": (TEXT_TOKENS, config["cross_attention_dim"]),
        "audio_text": (TEXT_TOKENS, config["audio_cross_attention_dim"]),
    }
    return {name: torch.randn(1, *shape) for name, shape in shapes.items()}


if __name__ == "__main__":
    main()
