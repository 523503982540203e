"""What is measured on a ground: a training, the base, real clips; and what DPO's pairs cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset

from syncdpo.data.clips import read_clip
from syncdpo.data.files import digest
from syncdpo.data.latents import LatentDataset
from syncdpo.demo.demonstration import OWN_FIGURES, SPENT
from syncdpo.demo.search import keeps_events
from syncdpo.evidence.grounds import Ground, families_of, load_base
from syncdpo.evidence.protocol import FAMILIES_OF, RANKED_BY, TRAINED
from syncdpo.metrics import ClipMetrics, clip_metrics, summarise
from syncdpo.models import Model
from syncdpo.models.tiny import FAMILIES_BASE
from syncdpo.ranking import Measure, Source, prepare_ranked, rank
from syncdpo.sampling import generate, noise_seeds
from syncdpo.train import train
from syncdpo.training import TrainConfig, TrainingDiverged

FIGURES = ("f1_undetectable", *OWN_FIGURES)
LOST = dict.fromkeys(FIGURES) | {"events_per_clip": 0.0}  # of a training that diverged


@dataclass(frozen=True)
class Trial:
    """One training, or the base, and what it makes of pictures that it was not trained on.

    settings: as `TrainConfig` has them. kind: which pictures. family: the one that is trained on
    and measured, where it is one alone. ranked_by: of DPO's pairs.
    """

    ground: Ground
    method: str
    settings: dict = field(default_factory=dict)
    kind: str = "validation"
    family: str = ""
    ranked_by: str = ""

    @property
    def asked(self) -> dict:
        numbers = ("clips", "own", "sampling_steps", "ranked")
        told = {name: getattr(self.ground.protocol, name) for name in numbers}
        told |= {"pictures": self.ground.protocol.count(self.kind)}
        keys = ("method", "kind", "family", "ranked_by", "name")
        told |= {key: getattr(self, key) for key in keys} | {"seed": self.ground.seed}
        return self.settings | told

    @property
    def name(self) -> str:
        """Of its folder: another one for another training."""
        if not self.settings:
            return self.method
        told = digest(self.settings | {"family": self.family, "ranked_by": self.ranked_by})[:8]
        return f"{self.method}-{self.settings['learning_rate']:g}-{told}"

    @property
    def folder(self) -> Path:
        return self.ground.work / "runs" / self.name

    def run(self) -> dict:
        model, spent = load_base(), dict.fromkeys(SPENT, 0)
        if self.settings:
            try:
                spent = train(self.config(), data=self._data(), progress=False)
            except TrainingDiverged as error:
                lost = LOST | {f"own_{key}": value for key, value in LOST.items()}
                lost |= {"families": dict.fromkeys(FAMILIES_OF[self.kind], LOST)}
                spent = spent | {"steps": self.settings["steps"]}
                return self.asked | lost | spent | {"keeps_events": False, "lost": str(error)}
            model.load_weights(self.folder)
        row = measure(model, self.ground, self.kind, self.folder / self.kind, self.family)
        if self.ground.heard is not None and not self.family:
            row["keeps_events"] = keeps_events(row, {"events_per_clip": self.ground.heard})
        return self.asked | row | {key: spent[key] for key in SPENT}

    def config(self) -> TrainConfig:
        return TrainConfig(
            output=str(self.folder),
            weights=str(FAMILIES_BASE),
            seed=self.ground.seed,
            resume=True,  # whoever was killed goes on, and nobody trains twice
            log_with="none",
            **self.settings,
        )

    def _data(self) -> Dataset:
        if self.ranked_by:
            return LatentDataset(self.ground.pairs(self.ranked_by))
        return self.ground.latents("training", self.family)


@dataclass(frozen=True)
class Real:
    """The clips themselves, with their own sound, through the codec: as good as it can get."""

    ground: Ground
    kind: str

    @property
    def asked(self) -> dict:
        count = self.ground.protocol.count(self.kind)
        told = {"method": "real", "name": f"real clips, {self.kind}", "kind": self.kind}
        return told | {"seed": self.ground.seed, "pictures": count}

    def run(self) -> dict:
        model, data = load_base(), self.ground.latents(self.kind)
        found = []
        for latents in data:
            clips = model.decode(latents["video"][None], latents["audio"][None])
            found += map(clip_metrics, clips)
        return self.asked | of_families(found, families_of(data)) | dict.fromkeys(SPENT, 0)


@dataclass(frozen=True)
class Pairs:
    """DPO's pairs, of several sounds to each training clip's picture; the row has their price."""

    ground: Ground

    @property
    def asked(self) -> dict:
        numbers = ("clips", "ranked", "sampling_steps")
        told = {name: getattr(self.ground.protocol, name) for name in numbers}
        return told | {"method": "pairs", "name": "pairs", "seed": self.ground.seed}

    def run(self) -> dict:
        model, protocol = load_base(), self.ground.protocol
        data = self.ground.latents("training")
        names = [data.dataset.names[i] for i in data.indices]
        sources = [
            Source("", name, sample["video"]) for name, sample in zip(names, data, strict=True)
        ]
        row = self.asked | {"pairs": {}, "pairs_cpu_seconds": {}}
        for by in RANKED_BY:
            folder = self.ground.work / "ranked"
            summary = rank(
                model,
                sources,
                folder,
                Measure.of(by),
                count=protocol.ranked,
                seed=self.ground.seed,
                steps=protocol.sampling_steps,
                progress=False,
            )
            began = time.process_time()
            prepare_ranked(model, folder, self.ground.pairs(by), progress=False)
            spent = sum(summary.cpu_seconds[what] for what in ("sampling", "ranking"))
            row["pairs"][by] = len(summary.pairs)
            row["pairs_cpu_seconds"][by] = spent + time.process_time() - began
        return row


def measure(model: Model, ground: Ground, kind: str, folder: Path, family: str = "") -> dict:
    """The sound that the model gives to pictures, and clips of its own: written, read, measured.

    Figures of all families that are trained on together, of each family, and `own_…`.
    """
    protocol, data = ground.protocol, ground.latents(kind, family)
    video = torch.stack([latents["video"] for latents in data])
    seeds = noise_seeds(len(data), ground.seed, "evidence", kind)
    own_seeds = noise_seeds(protocol.own, ground.seed, "evidence", kind, "own")
    options = {"steps": protocol.sampling_steps, "progress": False}
    given = _measured(list(generate(model, folder / "given", seeds, video=video, **options)))
    own = summarise(_measured(list(generate(model, folder / "own", own_seeds, **options))))
    own = {f"own_{key}": own[key] for key in FIGURES}
    return of_families(given, families_of(data)) | own


def of_families(found: Sequence[ClipMetrics], families: Sequence[str]) -> dict:
    """The figures of all that are trained on, and those of each family."""
    named = list(zip(found, families, strict=True))
    told = {
        name: _figures([m for m, family in named if family == name])
        for name in dict.fromkeys(families)
    }
    return _figures([m for m, family in named if family in TRAINED]) | {"families": told}


def _figures(found: Sequence[ClipMetrics]) -> dict:
    row = summarise(found)
    return {key: row[key] for key in FIGURES}


def _measured(paths: Sequence[Path]) -> list[ClipMetrics]:
    return [clip_metrics(read_clip(path, require_sound=False)) for path in paths]
