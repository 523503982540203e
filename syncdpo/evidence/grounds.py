"""The clips of a seed: rendered, written as mp4, encoded; and what is heard in real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset, Subset

from syncdpo.data.families import find_family
from syncdpo.data.latents import LatentDataset, prepare
from syncdpo.data.synthetic import render_folder
from syncdpo.evidence.protocol import APART, FAMILIES_OF, FIRST_SEEDS, OFFSET_SPREADS, Protocol
from syncdpo.models import Model, load_model
from syncdpo.models.tiny import FAMILIES_BASE


@dataclass(frozen=True)
class Ground:
    """A seed's clips, in `folder`. heard: sounds per clip in real ones that are validated on."""

    protocol: Protocol
    folder: Path
    seed: int
    heard: float | None = None

    @property
    def work(self) -> Path:
        return self.folder / f"seed-{self.seed}"

    def prepare(self) -> None:
        """Render and encode; what is there is kept."""
        model = load_base()
        for kind, families in FAMILIES_OF.items():
            clips = self.work / "clips" / kind
            first = FIRST_SEEDS[kind] + APART * self.seed
            seeds = range(first, first + self.protocol.count(kind))
            for family in families:
                spread = OFFSET_SPREADS[kind]
                render_folder(
                    clips / family, seeds, offset_spread=spread, family=find_family(family)
                )
            prepare(model, clips, self._cache(kind), progress=False)

    def latents(self, kind: str, family: str = "") -> Dataset:
        """Clips by what they are for; of one family, or of all, which stand in turn."""
        data = LatentDataset(self._cache(kind))
        of = families_of(data)
        wanted = [family] if family else FAMILIES_OF[kind]
        places = [[i for i, name in enumerate(of) if name == one] for one in wanted]
        return Subset(data, [i for some in zip(*places, strict=True) for i in some])

    def pairs(self, ranked_by: str) -> Path:
        """Where the cache of DPO's pairs is."""
        return self.work / "pairs" / ranked_by

    def _cache(self, kind: str) -> Path:
        return self.work / "latents" / kind


def load_base() -> Model:
    """The embedded model with the base that all trainings begin with."""
    return load_model("tiny", weights=FAMILIES_BASE)


def families_of(data: Dataset) -> Sequence[str]:
    """The family of each clip: what the folder of its file was called."""
    if isinstance(data, Subset):
        known = families_of(data.dataset)
        return [known[i] for i in data.indices]
    return [Path(name).parts[0] for name in data.names]
