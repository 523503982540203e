"""Held-out figures during training, by forwards alone: what a run does to clips it never learns.

Of each held-out clip x four inputs are made, all with the same noise levels σ and noise ε: the
winner x itself, and the losers that the run's rule makes of it at difficulties 0, ½ and 1 (plain
pairs, which share the winner). Four forwards give, with e the error of the velocity and r what the
policy is measured against,

    margin     −½ Σ_m β_m {[e(policy) − e(r)]_win − [e(policy) − e(r)]_lose}   for each difficulty
    accuracy   share of the pairs whose margin is positive                     for each difficulty
    ratio      mean e(policy)_win ÷ mean e(r)_win                              for each stream
    sft_loss   Σ_m mean e_m(policy)_win

σ, ε and the distortions are functions of (seed, clip's name), never of training's own dice, so a
figure changes with the weights alone, and training does not know whether it was looked at. r is the
model as the run found it: its errors are those of the first validation, at step 0, for SFT as for
SyncDPO. With `reference: base` they are the base's. Either way they are computed once, and kept
with the checkpoints.

Of given pairs (`dpo`) the loser is the one that there is, so that two forwards give one margin and
one accuracy.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, default_collate

from syncdpo import ops
from syncdpo.data.buckets import buckets_of, present_format, take_format
from syncdpo.data.chance import generator
from syncdpo.data.files import digest, readable
from syncdpo.data.precomputed import open_latents
from syncdpo.models import Conditions, Model, Streams
from syncdpo.negatives import PairDraw, draw_pairs, given_pairs
from syncdpo.negatives.rules import parse_rule
from syncdpo.training.checkpoint import Log
from syncdpo.training.config import TrainConfig
from syncdpo.training.given import check_pairs, split_batch

DIFFICULTIES = (0.0, 0.5, 1.0)
FORWARDS = 1 + len(DIFFICULTIES)  # of a clip, at each validation
GIVEN = ("pairs",)  # what stands in the names of figures for a difficulty, where pairs are given
# What a clip costs in training, in forwards of one sample; a backward is two of them.
TRAINING_FORWARDS = {"sft": 3, "syncdpo": 8, "dpo": 8}
COST = 1 / 30  # of training, where `validate_every` leaves it to us; promised is a twentieth
LEAST = 6  # validations in a run, by which one can still tell a good step from a bad one


# --- which clips ----------------------------------------------------------------------------------


def hold_out(
    config: TrainConfig, model: Model, data: Dataset, held_out: Dataset | None, progress: bool
) -> tuple[Dataset, Dataset | None]:
    """(clips to train on, clips to validate on): `held_out` as given, `validation_data`, or a share
    of `data`; the latter None where nothing is to be held out.

    The held-out clips may have other formats than those that are trained on. Raises ValueError
    where the share leaves no clip to train or to validate on.
    """
    if held_out is not None and (config.validation or config.validation_data):
        raise ValueError("held_out: expected no validation or validation_data beside it, got both")
    if config.validation_data:
        trained = present_format(model)
        held_out = open_latents(config.validation_data, model, progress=progress)
        if progress and hasattr(held_out, "summary"):
            print(held_out.summary, file=sys.stderr)
        if own := present_format(model):  # the one that opening them left the model in
            held_out.buckets = [bucket or own for bucket in buckets_of(held_out)]
        take_format(model, trained)
    if held_out is not None:
        name = "validation_data" if config.validation_data else "held_out"
        check_pairs(config, held_out, name, progress)
    if not config.validation:
        if held_out is None and (config.keep == "best" or config.patience):
            raise ValueError(
                f"validation: keep {config.keep} and patience {config.patience} need held-out "
                "clips; choose a share, or name some as validation_data"
            )
        return data, held_out
    places = [_place(name) < config.validation for name in clip_names(data)]
    out, rest = ([i for i, chosen in enumerate(places) if chosen == side] for side in (True, False))
    if not out or not rest:
        raise ValueError(
            f"validation: {config.validation:g} of these {len(places)} clips, chosen by their "
            f"names, are {len(out)}, which leaves {len(rest)} to train on; choose another share, "
            "or name other clips as validation_data"
        )
    return Subset(data, rest), Subset(data, out)


def clip_names(data: Dataset) -> list[str]:
    """What the clips of a dataset are called; their places, where it has no `names`."""
    if isinstance(data, Subset):
        whole = clip_names(data.dataset)
        return [whole[index] for index in data.indices]
    return list(getattr(data, "names", None) or map(str, range(len(data))))


def _place(name: str) -> float:
    """In [0, 1), evenly spread over names: further clips move none of those that there are."""
    hashed = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") / 2**64


@dataclass(frozen=True)
class Plan:
    """How many clips are looked at, and how many steps lie between two validations."""

    clips: int
    every: int

    @classmethod
    def of(cls, config: TrainConfig, clips: int, processes: int) -> Plan:
        """As `validate_every` says, all clips; or as often, and as many, as cost 1/30 of training.

        The latter, too, has `LEAST` validations, for which there may have to be fewer clips.
        """
        if config.validate_every:
            return cls(clips, config.validate_every)
        trained = config.steps * config.batch_size * config.accumulation * processes
        forwards = 1 + len(levels(config))
        affordable = COST * trained * TRAINING_FORWARDS[config.method] / forwards
        some = min(clips, max(1, int(affordable / LEAST)))
        times = max(2, int(affordable / some))
        return cls(some, math.ceil(config.steps / (times - 1)))


def levels(config: TrainConfig) -> tuple[str, ...]:
    """What the losers of a held-out clip are called in the names of figures."""
    return GIVEN if config.method == "dpo" else tuple(f"{d:g}" for d in DIFFICULTIES)


# --- figures --------------------------------------------------------------------------------------


class Validation:
    """The held-out clips of a run, its figures so far, and which step was best.

    data: the held-out clips, or None, which makes all of this do nothing.
    save_best: called, on every process, when a step's weights are the best so far.
    progress: of the run, as its last checkpoint has it: `step`, and what `state` then was.

    What is best: the highest accuracy at the highest difficulty among the validations whose
    winners' error is not beyond chance above `winner_bound` times r's; of equals, the lowest
    `sft_loss`: who is as good at telling a pair and has forgotten less. Of SFT, which learns no
    pairs, the lowest `sft_loss` among them. Step 0 takes part. Given pairs have one difficulty,
    their own.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        data: Dataset | None,
        accelerator: Accelerator,
        progress: dict,
        save_best: Callable[[int], None],
    ):
        self.config, self.model, self.data = config, model, data
        self.accelerator, self.save_best = accelerator, save_best
        self.levels = levels(config)
        self.by_loss = config.method == "sft"
        self.state = progress["validation"] or {
            "clips": None, "reference": None, "best": None, "without_better": 0,
        }  # fmt: skip
        if data is None:
            return
        names = clip_names(data)
        self.plan = Plan.of(config, len(names), accelerator.num_processes)
        places = sorted(range(len(names)), key=lambda i: (_place(names[i]), names[i]))
        self.places = places[: self.plan.clips]
        self.names = [names[i] for i in self.places]
        # That of the run, where it has one only; a batch of another leaves no trace.
        self.format = present_format(model)
        buckets = buckets_of(data)
        self.buckets = [buckets[i] or self.format for i in self.places]
        self.rule = parse_rule(config.rules)
        self.draw = lru_cache(None)(self._draw)
        if self.plan.clips < len(names) and accelerator.is_main_process:
            print(
                f"validation: {self.plan.clips} of {len(names)} held-out clips, every "
                f"{self.plan.every} steps, as costs a twentieth of the run at most; set "
                "validate_every for all of them",
                file=sys.stderr,
            )
        if progress["step"] and self.state["clips"] != digest(self.names):
            raise ValueError(
                f"resume: expected the held-out clips that the run in {config.output} began with, "
                f"got {len(names)}, {readable(self.names[0])} among them"
            )
        self.state["clips"] = digest(self.names)

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.state["without_better"]

    def kept_step(self, last: int) -> int:
        """The step whose weights the run is to leave."""
        best = self.state["best"]
        return best["step"] if best and self.config.keep == "best" else last

    def against(self, reference: nn.Module) -> None:
        """Measure against this model, and not against the policy as it began."""
        if self.data is not None and not self.state["reference"]:
            self.state["reference"] = self._errors(reference)[0].tolist()

    def due(self, step: int) -> bool:
        if self.data is None:
            return False
        return step % self.plan.every == 0 or step == self.config.steps

    def __call__(self, step: int, policy: nn.Module, log: Log) -> None:
        """Figures of the policy after `step` steps go to the log; every process must call it."""
        if not self.due(step):
            return
        errors, valid = self._errors(policy)
        if not self.state["reference"]:
            self.state["reference"] = errors.tolist()
        reference = errors.new_tensor(self.state["reference"])
        figures = self.figures(errors, reference, valid)
        if self._is_best(step, figures) and self.config.keep == "best":
            self.save_best(step)
        best = self.state["best"]
        accuracy = figures[f"accuracy_{self.levels[-1]}"]
        shown = "—" if accuracy is None else f"{accuracy:.2f}"
        shown = {"held-out": shown, "winners": f"×{figures['winner_ratio']:.2f}"}
        log.found(step, "validation", figures | {"best_step": best and best["step"]}, shown)

    def figures(self, errors: Tensor, reference: Tensor, valid: Tensor) -> dict[str, float | None]:
        """From errors [clips, winner and losers, streams] and which losers differ [clips, losers].

        None where no pair counts.
        """
        margins = self._margins(errors, reference)
        ratios, least = (x.tolist() for x in ratio_of_means(errors[:, 0], reference[:, 0]))
        finite = all(map(math.isfinite, ratios))
        figures = {
            "winner_ratio": max(ratios) if finite else math.nan,
            "winner_ratio_least": max(least) if finite else math.nan,
            "video_ratio": ratios[0],
            "audio_ratio": ratios[1],
            "sft_loss": errors[:, 0].mean(0).sum().item(),
            "valid": valid.double().mean().item(),
            "clips": len(errors),
        }
        for level, called in enumerate(self.levels):
            own = margins[:, level][valid[:, level]]
            hits = (own.sign() + 1) / 2  # as the implicit accuracy of training has it
            for name, values in (("accuracy", hits), ("margin", own)):
                mean = values.mean().item() if len(values) else None
                figures[f"{name}_{called}"] = mean
        return figures

    def _margins(self, errors: Tensor, reference: Tensor) -> Tensor:
        """[clips, losers], as the loss has them; float64 keeps the digits of the difference."""
        gap = errors - reference
        delta = gap[:, :1] - gap[:, 1:]
        if self.config.normalize:
            delta = delta / ((reference[:, :1] + reference[:, 1:]) / 2)
        beta = errors.new_tensor([self.config.beta_video, self.config.beta_audio])
        return -(beta * delta).sum(-1) / 2

    def _is_best(self, step: int, figures: dict) -> bool:
        found = {
            "step": step,
            "accuracy": figures[f"accuracy_{self.levels[-1]}"],
            "sft_loss": figures["sft_loss"],
        }
        kept = figures["winner_ratio_least"] <= self.config.winner_bound
        if not self.by_loss:
            kept = kept and found["accuracy"] is not None
        best = self.state["best"]
        if kept and (best is None or self._worth(found) > self._worth(best)):
            self.state["best"] = found
            self.state["without_better"] = 0
            return True
        self.state["without_better"] += step > 0
        return False

    def _worth(self, found: dict) -> tuple[float, ...]:
        """SFT does not learn to tell pairs: it goes by its own loss alone."""
        return (-found["sft_loss"],) if self.by_loss else (found["accuracy"], -found["sft_loss"])

    # --- forwards ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _errors(self, transformer: nn.Module) -> tuple[Tensor, Tensor]:
        """Errors [clips, winner and losers, streams], float64, and which losers differ from their
        winners, [clips, losers] bool; the same on every process."""
        device, clips, losers = self.accelerator.device, len(self.places), len(self.levels)
        errors = torch.zeros(clips, 1 + losers, 2, dtype=torch.float64, device=device)
        valid = torch.zeros(clips, losers, dtype=torch.int64, device=device)
        training = transformer.training
        transformer.eval()
        for rows, counts in self._share():
            found, differ = self._batch(transformer, rows)
            if counts:
                errors[rows], valid[rows] = found, differ.long()
        transformer.train(training)
        take_format(self.model, self.format)
        errors, valid = (self.accelerator.reduce(table, "sum") for table in (errors, valid))
        return errors.cpu(), valid.bool().cpu()

    def _share(self) -> list[tuple[list[int], bool]]:
        """This process's batches of rows, each with whether it counts.

        Every process has as many, as sharded weights ask for; where there are not enough, one comes
        again and does not count.
        """
        size, world = self.config.batch_size, self.accelerator.num_processes
        formats = {bucket: [] for bucket in self.buckets}  # a batch holds one
        for row, bucket in enumerate(self.buckets):
            formats[bucket].append(row)
        batches = [rows for alike in formats.values() for rows in batched(alike, size)]
        padded = range(math.ceil(len(batches) / world) * world)
        mine = padded[self.accelerator.process_index :: world]
        return [(batches[i % len(batches)], i < len(batches)) for i in mine]

    def _batch(self, transformer: nn.Module, rows: list[int]) -> tuple[Tensor, Tensor]:
        """[B, winner and losers, streams] and [B, losers], in forwards as large as training's."""
        device = self.accelerator.device
        take_format(self.model, self.buckets[rows[0]])
        batch = default_collate([self.data[self.places[row]] for row in rows])
        batch = {name: x.to(device) for name, x in batch.items()}
        clean, lose, batch = split_batch(batch)
        drawn = [self.draw(self.names[row]) for row in rows]
        sigma = tuple(torch.cat([d.sigma[m] for d in drawn]).to(device) for m in range(2))
        seed = torch.cat([d.seed for d in drawn]).to(device)
        if self.config.method == "dpo":
            inputs, valid = [clean, lose], given_pairs(clean, lose).valid[:, None]
        else:
            inputs, valid = _winner_and_losers(clean, [d.pairs for d in drawn])
        noise = [ops.noise(x.shape, seed, stream=m) for m, x in enumerate(clean)]
        errors = [
            self._error(transformer, pair, noise, sigma, seed, batch) for pair in batched(inputs, 2)
        ]
        return torch.cat(errors, 1), valid

    def _error(
        self,
        transformer: nn.Module,
        pair: Sequence[Streams],
        noise: Sequence[Tensor],
        sigma: Streams,
        seed: Tensor,
        conditions: Conditions,
    ) -> Tensor:
        """[B, two inputs, streams] float64: the mean squared error of each one's velocity."""
        noisy = ops.paired_noise(*pair, sigma, seed)
        twice = {name: torch.cat([x, x]) for name, x in conditions.items()}
        with self.accelerator.autocast():
            velocity = self.model.velocity(
                transformer, noisy, tuple(torch.cat([s, s]) for s in sigma), twice
            )
        target = [
            self.model.velocity_sign * (torch.cat([e, e]) - torch.cat(both).float())
            for e, both in zip(noise, zip(*pair, strict=True), strict=True)
        ]
        errors = [
            (v.double() - y.double()).square().flatten(1).mean(1)
            for v, y in zip(velocity, target, strict=True)
        ]
        return torch.stack(errors, -1).unflatten(0, (2, -1)).transpose(0, 1)

    def _draw(self, name: str) -> Draw:
        """What is random about a clip."""
        source = generator(self.config.seed, "validation", name)
        sigma = self.model.draw_sigma(1, source)
        seed = torch.randint(2**63 - 1, (1,), generator=source)
        if self.config.method == "dpo":
            return Draw(sigma, seed, None)
        video, audio = self.model.timelines
        pairs = draw_pairs(
            len(DIFFICULTIES),
            self.rule,
            torch.tensor(DIFFICULTIES, device=self.accelerator.device),
            video_timeline=video,
            audio_timeline=audio,
            matched=0.0,
            generator=source,
            device=self.accelerator.device,
        )
        return Draw(sigma, seed, pairs)


@dataclass(frozen=True)
class Draw:
    """Of one clip: its noise levels and noise seed, [1] each, and what makes its losers."""

    sigma: Streams
    seed: Tensor
    pairs: PairDraw | None


def ratio_of_means(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """r = mean above ÷ mean below, over clips, and what it is at least, beyond chance:

        r · exp(−2 s / r),    s = sd(above − r · below) ÷ (√clips · mean below)

    two standard errors less, as a factor. At noise levels where the reference is nearly right, an
    error can be thirty times the reference's, and elsewhere the same: of few clips, chance decides
    how many are of which kind. r itself, of a single clip.
    """
    ratio = above.mean(0) / below.mean(0)
    if len(above) == 1:
        return ratio, ratio
    spread = (above - ratio * below).std(0) / (len(above) ** 0.5 * below.mean(0))
    return ratio, ratio * torch.exp(-2 * spread / ratio)


def _winner_and_losers(clean: Streams, draws: Sequence[PairDraw]) -> tuple[list[Streams], Tensor]:
    """The winners, then the losers of each difficulty, [B, …]; which differ, [B, losers]."""
    made = [
        draw.make(*(x[b].expand(len(DIFFICULTIES), *x.shape[1:]) for x in clean))
        for b, draw in enumerate(draws)
    ]
    losers = [
        tuple(torch.stack([pairs.lose[m][level] for pairs in made]) for m in range(2))
        for level in range(len(DIFFICULTIES))
    ]
    return [clean, *losers], torch.stack([pairs.valid for pairs in made])


def batched(items: Sequence, size: int) -> list[list]:
    items = list(items)
    return [items[first : first + size] for first in range(0, len(items), size)]
