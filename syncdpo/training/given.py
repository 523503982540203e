"""Pairs that are given: what of a batch is theirs, and whether method and data go together."""

from __future__ import annotations

import sys

from torch import Tensor
from torch.utils.data import Dataset

from syncdpo.data.latents import LOSER, STREAMS
from syncdpo.models import Conditions, Streams
from syncdpo.training.config import TrainConfig

LOSERS = tuple(map(LOSER.format, STREAMS))


def split_batch(batch: dict[str, Tensor]) -> tuple[Streams, Streams, Conditions]:
    """(winners, losers, conditions) of a batch, or of a sample.

    A stream without a loser of its own is the winner's in both, the very same tensor: so are both
    of a clip that is no pair.
    """
    win = tuple(batch[stream] for stream in STREAMS)
    lose = tuple(batch.get(name, x) for name, x in zip(LOSERS, win, strict=True))
    return win, lose, {k: x for k, x in batch.items() if k not in (*STREAMS, *LOSERS)}


def check_pairs(config: TrainConfig, data: Dataset, name: str, says: bool) -> None:
    """Whether `data`, given as `name`, is what the method is for. Raises ValueError where not.

    sft and syncdpo take the winners of pairs for clips, which is said; syncdpo makes losers anew.
    """
    pairs = getattr(data, "pairs", None)  # of a cache; other data are asked where it matters
    where = getattr(data, "folder", getattr(data, "root", name))
    if config.method == "dpo" and pairs is None:
        pairs = any(key in data[0] for key in LOSERS)
    if config.method == "dpo" and not pairs:
        raise ValueError(
            f"{name}: expected a cache of pairs for method: dpo, as `syncdpo prepare-pairs` makes "
            f"one, got clips in {where}; method: syncdpo makes its own losers of clips"
        )
    if config.method != "dpo" and pairs:
        data.losers = False
        if says:
            print(
                f"{name}: {where} holds pairs, and method: {config.method} trains on clips: it "
                "takes the winners; method: dpo takes the pairs",
                file=sys.stderr,
            )
