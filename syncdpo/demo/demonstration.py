"""The demonstration: clips → latents → SFT and SyncDPO from one base → clips → figures → report.

Each model is asked for the sound of pictures that none was trained on, and for clips of its own.
Everything is measured on mp4 files, by what is seen and heard in them. How rendered clips are
trained on comes from `syncdpo.demo.trials`, which measure on other noise and other pictures than
`run` does; how a user's own are, from folders that no figure is reported of.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from syncdpo.data.clips import Clip, read_clip, write_clip
from syncdpo.data.files import readable, write_atomic
from syncdpo.data.latents import LatentDataset, prepare
from syncdpo.data.synthetic import render_folder
from syncdpo.demo.own_clips import (
    Redrawn,
    StandardisedTiny,
    Statistics,
    f1_interval,
    remarks,
    repeated,
    split,
)
from syncdpo.demo.report import LABELS, SHOWN, write_report
from syncdpo.metrics import ClipMetrics, clip_metrics, summarise
from syncdpo.models import Model, load_model
from syncdpo.sampling import generate, noise_seeds
from syncdpo.train import train
from syncdpo.training.checkpoint import read_log
from syncdpo.training.config import TrainConfig

TRAINING_CLIPS = 256
# Standard deviation, in seconds, of the sound's offset in the clips that are trained on: no footage
# is in step to the millisecond. 93 % of them are what ITU-R BT.1359 calls acceptable.
OFFSET_SPREAD = 0.06
# First seeds of the rendered pictures that want a sound; settings are chosen on "validation".
HELD_OUT = {"validation": 1_000_000, "unseen": 7_000_000}
OWN_FIGURES = ("f1", "onset_error_ms", "onset_error_median_ms", "events_per_clip", "seen_per_clip")
SPENT = ("steps", "seconds", "cpu_seconds")
FIRST = "sft-before-syncdpo"  # folder of the SFT that SyncDPO goes on from
# What may be trained.
WEIGHTS = {
    "all": {"lora_rank": 0, "trained": "both"},
    "sound's half": {"lora_rank": 0, "trained": "audio"},
}
# Picture and sound have noise levels of their own in training: so the sound learns to follow a
# picture that is clearer than itself, too. `matched` is what suits SyncDPO best here.
TRAINING = {"sft": {"sigma": "separate"}, "syncdpo": {"sigma": "separate", "matched": 0.75}}


@dataclass(frozen=True)
class Recipe:
    """How clips of a kind are trained on. steps: of SFT and SyncDPO alike, unless others are asked
    for. chosen: each method's weights and learning rate. sft_weight: SyncDPO's. first: share of
    SyncDPO's steps that are SFT's, from which it goes on. looks: at held-out clips in a training.
    """

    steps: int
    chosen: dict[str, tuple[str, float]]
    sft_weight: float = 1.0
    first: float = 0.0
    looks: int = 0

    @property
    def first_steps(self) -> int:
        return int(self.first * self.steps)


# Of `make tune`.
RENDERED = Recipe(
    60, {"sft": ("all", 8e-3), "syncdpo": ("sound's half", 1.1e-2), "sft-equal-time": ("all", 4e-3)}
)
# What other clips look and sound like is to be learnt first, by SFT and all weights. A preference
# needs half of the time then, and clips of the model's own lose less by it (docs/demo.md).
OWN = Recipe(
    360,
    {"sft": ("all", 8e-3), "syncdpo": ("sound's half", 8e-3), "sft-equal-time": ("all", 8e-3)},
    sft_weight=3.0,
    first=2 / 3,
    looks=6,
)


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demonstration. `clips`: a folder of the user's own instead of rendered ones.
    `steps`: by default what suits these clips.

    `purpose` names the pictures and the noise that samples start from; `offset_spread` is that of
    rendered training clips. What is given and measured against is exactly in step.
    """

    output: Path = Path("runs/demo")
    clips: Path | None = None
    steps: int | None = None
    samples: int = 128
    sampling_steps: int = 40
    seed: int = 0
    purpose: str = "unseen"
    offset_spread: float = OFFSET_SPREAD
    progress: bool = True

    @property
    def recipe(self) -> Recipe:
        recipe = OWN if self.clips else RENDERED
        return recipe if self.steps is None else replace(recipe, steps=self.steps)

    @property
    def work(self) -> Path:
        """All but the report, apart for each kind of training clips and each seed: what was
        trained on others must not be taken for done."""
        kind = f"rendered-{1000 * self.offset_spread:g}ms"
        if self.clips:
            path = sha256(bytes(self.clips.resolve())).hexdigest()[:8]
            kind = f"{readable(self.clips.name)}-{path}"
        return self.output / f"{kind}-seed-{self.seed}"

    @property
    def latents(self) -> Path:
        return self.work / "latents"


@dataclass(frozen=True)
class Clips:
    """Latents to train on, and others, never trained on, whose pictures are given a sound.

    validated: further ones that tell which step of a training is best. statistics: of a user's own
    clips, what their latents are standardised by.
    """

    training: Dataset
    held_out: Dataset
    validated: Redrawn | None = None
    statistics: Statistics | None = None

    def model(self) -> Model:
        return StandardisedTiny(self.statistics) if self.statistics else load_model("tiny")


@dataclass(frozen=True)
class Sampled:
    """What was generated by one method: mp4 files, and what is seen and heard in each."""

    paths: list[Path]
    metrics: list[ClipMetrics]


class Samples(NamedTuple):
    """Of one method: given pictures with its sound, and clips of its own."""

    given: Sampled
    own: Sampled


def run(config: DemoConfig) -> dict:
    """Train, sample, measure; write report.html and report.json, and return the latter."""
    clips = prepare_clips(config)
    rows, sampled, logs = [], {}, {}
    for method in LABELS:
        result = {}
        if method != "base":
            result = train_row(config, method, clips)
            logs[method] = read_logs(config, method)
        sampled[method] = sample_both(config, method, clips)
        rows.append(row(method, sampled[method], result))
        if result:
            rows[-1] |= {"weights": weights_of(config.recipe, method)}
            rows[-1] |= {key: result[key] for key in ("kept_step", "warnings")}
        if config.clips:
            of = sampled[method].given.metrics
            rows[-1]["f1_interval"] = f1_interval(of, len(clips.held_out))
    report = {"rows": rows, "real": real_clips(clips), "settings": describe(config, clips)}
    report["remarks"] = remarks(rows, len(clips.held_out)) if config.clips else []
    write_atomic(config.output / "report.json", json.dumps(report, indent=2).encode())
    real = write_real(config, clips)
    write_report(config.output / "report.html", report, sampled, logs, real)
    return report


def train_row(config: DemoConfig, method: str, clips: Clips) -> dict:
    """Train a method of the table; the result of `train`, of both trainings where SyncDPO goes on
    from SFT."""
    recipe, steps = config.recipe, config.recipe.steps
    first = recipe.first_steps if method == "syncdpo" else 0
    if method == "sft-equal-time":
        sft, syncdpo = settings_of(recipe, method), settings_of(recipe, "syncdpo")
        steps = equal_time(steps - recipe.first_steps, sft, syncdpo, clips.training)
        steps += recipe.first_steps
    if not first:
        return train_method(config, method, clips, **chosen(config, method, clips, steps))
    before = train_method(config, FIRST, clips, **chosen(config, "sft", clips, first))
    settings = chosen(config, method, clips, steps - first)
    settings["weights"] = str(config.work / FIRST)
    result = train_method(config, method, clips, **settings)
    result["kept_step"] += first
    return result | {key: before[key] + result[key] for key in (*SPENT, "warnings")}


def read_logs(config: DemoConfig, method: str) -> list[dict]:
    """Of all steps of a method, those of the SFT that it goes on from first."""
    before = method == "syncdpo" and config.recipe.first_steps
    return (read_log(config.work / FIRST) if before else []) + read_log(config.work / method)


def weights_of(recipe: Recipe, method: str) -> str:
    """Which a method of the table trains."""
    weights, _ = recipe.chosen[method]
    if method == "syncdpo" and recipe.first_steps:
        return f"{recipe.chosen['sft'][0]}, then {weights}"
    return weights


def chosen(config: DemoConfig, method: str, clips: Clips, steps: int) -> dict:
    """How a method trains for so many steps, as `TrainConfig` has it."""
    settings = settings_of(config.recipe, method) | {"steps": steps}
    if clips.validated:
        settings |= {"keep": "best", "validate_every": -(-steps // config.recipe.looks)}
    return settings


def settings_of(recipe: Recipe, method: str) -> dict:
    weights, learning_rate = recipe.chosen[method]
    settings = training(method) | WEIGHTS[weights] | {"learning_rate": learning_rate}
    return settings | ({"sft_weight": recipe.sft_weight} if method == "syncdpo" else {})


def training(method: str) -> dict:
    """What all trainings of a method of the table have in common, as `TrainConfig` has it."""
    objective = method.removesuffix("-equal-time")
    return {"method": objective} | TRAINING[objective]


def equal_time(steps: int, sft: dict, syncdpo: dict, data: Dataset) -> int:
    """Steps of SFT in the time that so many of SyncDPO take, by the work that a step is: a clock
    would count whatever else the machine does, and give other steps every time."""
    return max(1, round(steps * operations(syncdpo, data) / operations(sft, data)))


def operations(settings: dict, data: Dataset) -> int:
    """Floating-point operations of a step's matrix products."""
    counter = FlopCounterMode(display=False)
    with tempfile.TemporaryDirectory() as folder, counter:
        one = {"output": folder, "steps": 1, "log_with": "none"}
        train(TrainConfig(**settings | one), data=data, progress=False)
    return counter.get_total_flops()


def prepare_clips(config: DemoConfig) -> Clips:
    """Render clips to mp4, unless the user has given some, and encode what is in the files.

    Raises ValueError where the user's clips are too few to train on some and measure on others.
    """
    if config.clips is None:
        first = HELD_OUT[config.purpose] + 1000 * config.seed
        seeds = range(TRAINING_CLIPS * config.seed, TRAINING_CLIPS * (config.seed + 1))
        pictures = range(first, first + config.samples)
        latents = config.work / "held-out-latents"
        held_out = render(config, pictures, config.work / "held-out", latents)
        # An earlier run in this folder may have left more of them.
        held_out = Subset(held_out, range(config.samples))
        spread = config.offset_spread
        training = render(
            config, seeds, config.work / "clips", config.latents, offset_spread=spread
        )
        return Clips(training, held_out)
    own = split(encode(config, config.clips, config.latents), config.clips)
    return Clips(own.training, own.measured, own.validated, own.statistics)


def render(
    config: DemoConfig, seeds: range, clips: Path, latents: Path, *, offset_spread: float = 0.0
) -> Dataset:
    """Latents of rendered clips, by way of mp4 files."""
    wanted = tqdm(seeds, "render", unit="clip", disable=not config.progress)
    render_folder(clips, wanted, offset_spread=offset_spread)
    return encode(config, clips, latents)


def encode(config: DemoConfig, clips: Path, latents: Path) -> Dataset:
    model = load_model("tiny")
    summary = prepare(model, clips, latents, progress=config.progress)
    if summary.skipped:
        print(summary)
    return LatentDataset(latents, model.identity())


def train_method(config: DemoConfig, name: str, clips: Clips, **settings) -> dict:
    """One training from the base, into `work`/`name`; the result of `train`."""
    run = TrainConfig(
        data=str(config.latents),
        output=str(config.work / name),
        seed=config.seed,
        resume=True,  # the same command goes on where it was stopped, and repeats no training
        **settings,
    )
    return train(run, data=clips.training, held_out=clips.validated, progress=config.progress)


def sample_both(config: DemoConfig, method: str, clips: Clips) -> Samples:
    return Samples(add_sound(config, method, clips), sample(config, method, clips))


def add_sound(config: DemoConfig, method: str, clips: Clips) -> Sampled:
    """The held-out pictures with a sound of the model's: a clip it saw in training helps nobody."""
    given = repeated(clips.held_out, config.samples)
    video = torch.stack([latents["video"] for latents in given])
    return sample(config, method, clips, "sounds", len(video), video=video)


def sample(
    config: DemoConfig,
    method: str,
    clips: Clips,
    kind: str = "clips",
    count: int | None = None,
    **given,
) -> Sampled:
    """Generate clips, write them as mp4, and measure what comes back from the files."""
    model = clips.model()
    if method != "base":
        model.load_weights(config.work / method)
    seeds = noise_seeds(count or config.samples, config.seed, config.purpose)
    generated = generate(
        model,
        config.work / "samples" / method / kind,
        seeds,
        steps=config.sampling_steps,
        progress=config.progress,
        label=f"{kind} of {method}",
        **given,
    )
    paths = list(generated)
    return Sampled(paths, [clip_metrics(read_clip(path, require_sound=False)) for path in paths])


def row(method: str, sampled: Samples, result: dict | None = None) -> dict:
    """A line of the table: the sound for given pictures, and `own_…`: the model's own clips."""
    training = {k: (result or {}).get(k, 0) for k in SPENT}
    own = summarise(sampled.own.metrics)
    own = {f"own_{key}": own[key] for key in OWN_FIGURES}
    return {"method": method} | summarise(sampled.given.metrics) | own | training


def real_clips(clips: Clips) -> dict:
    """The held-out clips with their own sound, through the codec: as good as it can get."""
    return summarise([clip_metrics(clip) for clip in decoded(clips, len(clips.held_out))])


def write_real(config: DemoConfig, clips: Clips) -> list[Path]:
    """The first of them as mp4, to stand beside the generated ones."""
    folder = config.work / "samples" / "real"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, clip in enumerate(decoded(clips, min(SHOWN, len(clips.held_out)))):
        paths.append(folder / f"{number:03d}.mp4")
        write_clip(paths[-1], clip)
    return paths


def decoded(clips: Clips, count: int) -> Iterator[Clip]:
    """So many of the held-out clips, through the codec."""
    model = clips.model()
    for latents in Subset(clips.held_out, range(count)):
        yield from model.decode(latents["video"][None], latents["audio"][None])


def describe(config: DemoConfig, clips: Clips) -> dict:
    """What a reader needs to judge the table."""
    chosen = config.recipe.chosen
    return {
        "seed": config.seed,
        "steps": config.recipe.steps,
        "samples": config.samples,
        "sampling_steps": config.sampling_steps,
        "training": TRAINING,
        "sft_weight": config.recipe.sft_weight,
        "first_steps": config.recipe.first_steps,
        "weights": {method: weights_of(config.recipe, method) for method in chosen},
        "learning_rate": {method: rate for method, (_, rate) in chosen.items()},
        "clips": str(config.clips or "rendered"),
        "offset_spread": None if config.clips else config.offset_spread,
        "training_clips": len(clips.training),
        "held_out_clips": len(clips.held_out),
        "validated_clips": clips.validated.clips if clips.validated else 0,
    }


def format_table(report: dict) -> str:
    """The table of a report, as text, and what is to be said of it."""
    return "\n".join([*(format_row(row) for row in report["rows"]), *report["remarks"]])


def format_row(row: dict) -> str:
    """One line: what every row has in common."""
    given, own = (
        f"F1 {f1:>4}, {error:>4} ms" for f1, error in (figures(row), figures(row, "own_"))
    )
    return (
        f"{row['method']:<15} {given}   {row['events_per_clip']:.2f} sounds per clip   "
        f"own clips: {own}   {row['steps']:4d} steps, {row['cpu_seconds']:4.0f} s of CPU"
    )


def figures(row: dict, prefix: str = "") -> tuple[str, str]:
    """F1 and mean onset error of a row as text; a dash where there is none."""
    named = ((f"{prefix}f1", ".2f"), (f"{prefix}onset_error_ms", ".0f"))
    f1, error = ("—" if row[key] is None else format(row[key], form) for key, form in named)
    return f1, error
