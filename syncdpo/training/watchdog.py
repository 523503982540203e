"""What goes wrong in a run, said while it happens: one sentence with the setting to change.

Each check is a function of the log's rows so far, and of nothing else: a run that goes on, or a
report of one that is over, finds what was found at the time. A check speaks once in a run. Nothing
is stopped by it.

Where a constant was measured, it was on the embedded model, in the demonstration's setting: 256
clips, 60 steps, the sound's half at 1.1e-2 or all weights at 4e-3, which end well; and the same
with a β of 1000 in the place of 10, with 30 times the learning rate, with silent clips, with 8.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from syncdpo.data.files import write_atomic
from syncdpo.training.checkpoint import is_step
from syncdpo.training.config import TrainConfig

FILE = "warnings.txt"
# Steps that are looked at together: the errors of one depend on the noise levels it drew.
WINDOW = 8
BEGINNING = 16  # clips
# So few held-out clips may by chance all have noise levels of one kind, at which a run that ends
# well is at 8 times the reference's error: then training's rows, of more clips, are asked.
FEW_HELD_OUT = 16
# Times the reference's error on winners. Runs that end well go up to 6.1 of it on the way, at their
# highest learning rate, and come down with it; 30 times that rate reaches 1000 in four steps.
FORGOTTEN = 10.0
# The share of the run after which `winner_bound` is to hold: runs that end well, at 1.5 to 2.4, are
# no higher than 2.5 then. Training rows, which draw anew every time and are distorted clips for the
# most part, are allowed half as much again.
COMING_DOWN = 0.9
DRAWN_ANEW = 1.5
# Mean size of the margin m. The loss's gradient is as σ(−m): beyond this it is a hundredth of a
# percent of what it is at 0, and what is learnt is noise. Runs that end well stay below 2.5.
RUNAWAY = 10.0
# Accuracy, over so many pairs that chance alone is within 0.05 of a half (two standard deviations),
# after so many steps, or three quarters of a shorter run. Runs that end well are above 0.6 by then;
# of clips whose sounds are new to the model, some had only begun at half.
STUCK, STUCK_PAIRS, STUCK_STEPS, STUCK_SHARE = 0.55, 400, 300, 0.75
# Share of pairs that differ; 0.94 is the lowest of any step of the demonstration, silence has 0.
VALID = 0.5
# So few clips, seen so often, do not stand for others: an eighth of the demonstration's, seen five
# times as often.
FEW_CLIPS, OFTEN = 32, 20
# Held-out accuracy must fall by this much, and by three standard deviations of so few clips', and
# held-out error rise by this factor, while training's own figures go the other way.
FALL, RISE, BETTER = 0.15, 1.3, 0.9
# Sounds per clip, of what there should be: a model that fell silent on the way had 0.37 of them.
SILENT = 0.5


@dataclass
class History:
    """The rows of a run so far, by their kind, and what they are of.

    clips: that are trained on, or pairs; batch: of them per step, over all processes.
    """

    config: TrainConfig
    clips: int
    batch: int
    steps: list[dict] = field(default_factory=list)
    validations: list[tuple[int, dict]] = field(default_factory=list)
    samples: list[tuple[int, dict]] = field(default_factory=list)

    def add(self, row: dict) -> None:
        if is_step(row):
            self.steps.append(row)
        for kind, rows in (("validation", self.validations), ("samples", self.samples)):
            if kind in row:
                rows.append((row["step"], row[kind]))

    @property
    def done(self) -> int:
        """Steps."""
        return self.steps[-1]["step"] + 1 if self.steps else 0

    def recent(self, name: str, until: int | None = None) -> float | None:
        """Mean of a figure over the last `WINDOW` steps (before step `until`); None where they
        are fewer, or lack it. Steps that are not finite are left out."""
        rows = self.steps[:until][-WINDOW:]
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        return sum(values) / len(values) if len(values) == WINDOW else None

    def first(self, name: str) -> float | None:
        """Mean of a figure over the first `BEGINNING` clips: the first step alone is the model's
        as it began, but a step may be of one clip."""
        rows = self.steps[: math.ceil(BEGINNING / self.batch)]
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        return sum(values) / len(values) if values else None


# --- checks ---------------------------------------------------------------------------------------


def winners_forgotten(history: History) -> str | None:
    """The winner's error, of the reference's: far above it, or still above it near the end."""
    ratio, least, where, step = _winner_ratio(history)
    if ratio is None:
        return None
    late = step >= COMING_DOWN * history.config.steps
    bound = history.config.winner_bound * (1 if where == "held-out clips" else DRAWN_ANEW)
    if least <= FORGOTTEN and not (late and least > bound):
        return None
    beta = "" if history.config.method == "sft" else " or beta_audio, or raise sft_weight"
    against = "what it was" if history.config.method == "sft" else "the reference's"
    return (
        f"winners are forgotten: the error on {where} is {ratio:.3g} times {against}; "
        f"lower learning_rate{beta}"
    )


def _winner_ratio(history: History) -> tuple[float | None, float | None, str, int]:
    """The latest one, what it is at least, beyond chance, of which clips (held-out ones where there
    are enough), and after which step."""
    if history.validations and history.validations[-1][1]["clips"] >= FEW_HELD_OUT:
        step, figures = history.validations[-1]
        ratio, least = figures["winner_ratio"], figures["winner_ratio_least"]
        if not math.isfinite(least):
            ratio = least = math.inf
        return ratio, least, "held-out clips", step
    ratios = []
    for stream in ("video", "audio"):
        if history.config.method == "sft":
            now, then = history.recent(f"{stream}_error"), history.first(f"{stream}_error")
        else:
            now = history.recent(f"{stream}_error_win")
            then = history.recent(f"{stream}_reference_win")
        if now is not None and then:
            ratios.append(now / then)
    ratio = max(ratios, default=None)
    return ratio, ratio, "the clips of training", history.done


def margins_run_away(history: History) -> str | None:
    """Of training's steps, whichever sign each has, or of held-out clips."""
    rows = history.steps[-WINDOW:]
    sizes = [abs(row["margin"]) for row in rows if math.isfinite(row.get("margin", math.nan))]
    found = [sum(sizes) / WINDOW] if len(sizes) == WINDOW else []
    for _, figures in history.validations[-1:]:
        found += [abs(v) for k, v in figures.items() if k.startswith("margin_") and v is not None]
    if not found or max(found) <= RUNAWAY:
        return None
    return (
        f"margins run away: they are {max(found):.3g} in size, and beyond {RUNAWAY:g} the loss is "
        f"flat; lower {_betas(history.config)}, or learning_rate"
    )


def _betas(config: TrainConfig) -> str:
    own = {"beta_video": config.beta_video, "beta_audio": config.beta_audio}
    return " and ".join(f"{name} ({value:g})" for name, value in own.items() if value)


def accuracy_stuck(history: History) -> str | None:
    if history.done < min(STUCK_STEPS, STUCK_SHARE * history.config.steps):
        return None
    pairs = hits = 0.0
    for row in reversed(history.steps):
        counted = history.batch * row.get("valid", 0.0)
        pairs += counted
        hits += counted * row.get("implicit_accuracy", 0.0)
        if pairs >= STUCK_PAIRS:
            break
    if pairs < STUCK_PAIRS or hits / pairs >= STUCK:
        return None
    doubt = "the clips are in step (`syncdpo probe` tells whether the rules can be heard)"
    if history.config.method == "dpo":
        doubt = "the winners of data are the better ones"
    return (
        f"nothing is learnt: accuracy is {hits / pairs:.2f} over the last {pairs:.0f} pairs, as by "
        "chance; raise learning_rate if margin stays near 0, lower it if not, or see whether "
        f"{doubt}"
    )


def steps_skipped(history: History) -> str | None:
    skipped = history.steps[-1]["skipped"] if history.steps else 0
    if not skipped:
        return None
    return (
        f"{skipped} step{'s' * (skipped > 1)} without a finite loss and gradient, which taught "
        "nothing; lower learning_rate, or leave out the clip whose latents are broken"
    )


def pairs_alike(history: History) -> str | None:
    valid = history.recent("valid")
    if valid is None and history.validations:
        valid = history.validations[-1][1]["valid"]
    if valid is None or valid >= VALID:
        return None
    if history.config.method == "dpo":
        return (
            f"{1 - valid:.0%} of the pairs count nothing: their winner and loser are alike; set "
            "data to pairs that differ by more than a hundredth of their size"
        )
    return (
        f"{1 - valid:.0%} of the pairs count nothing: their winner and loser came out alike, as of "
        "silence or a hum; set data to clips that have sounds of their own (`syncdpo prepare "
        "--strict` leaves out the others)"
    )


def too_few_clips(history: History) -> str | None:
    seen = history.done * history.batch / history.clips
    if history.clips >= FEW_CLIPS or seen <= OFTEN:
        return None
    unit = "pairs" if history.config.method == "dpo" else "clips"
    return (
        f"{history.clips} {unit}, each seen {seen:.0f} times by now, stand for nothing but "
        f"themselves; set data to {FEW_CLIPS} or more, or steps to fewer"
    )


def memorised(history: History) -> str | None:
    """Held-out figures get worse, by more than chance, while those of training get better.

    Not where winners are forgotten anyway: then errors go up and down by more than that.
    """
    worst = max((figures["winner_ratio_least"] for _, figures in history.validations), default=0.0)
    # Only from where there are steps before it is there a figure of training beside it.
    validations = [(step, figures) for step, figures in history.validations if step >= WINDOW]
    if len(validations) < 3 or not worst <= FORGOTTEN:
        return None
    step, _ = validations[-1]
    for name, better in (("accuracy", _accuracy), ("error", _rise)):
        then, fall, enough = better(validations)
        earlier, later = (_trained(history, name, s) for s in (then, step))
        if fall is None or earlier is None or later is None or fall < enough:
            continue
        if later >= earlier if name == "accuracy" else later <= BETTER * earlier:
            return (
                f"the clips are learnt by heart: since step {then} held-out {name} "
                f"{'fell' if name == 'accuracy' else 'rose'} while that of training "
                f"{'did not' if name == 'accuracy' else 'fell'}; set data to more clips (there "
                f"are {history.clips}), steps to fewer, or keep to best"
            )
    return None


def _accuracy(validations: Sequence[tuple[int, dict]]) -> tuple[int, float | None, float]:
    """Since which step the mean of all difficulties has fallen, by how much, how much is more than
    chance: of two validations the better one, so that both must be that low."""
    means = []
    for step, figures in validations:
        levels = [v for name, v in figures.items() if name.startswith("accuracy_")]
        if None in levels:  # no pair of these clips counts
            return 0, None, FALL
        means.append((sum(levels) / len(levels), step))
    known, last = means[:-2], [mean for mean, _ in means[-2:]]
    best, then = max(known)
    chance = 3 * 0.5 / math.sqrt(validations[-1][1]["clips"])
    return then, best - max(last), max(FALL, chance)


def _rise(validations: Sequence[tuple[int, dict]]) -> tuple[int, float, float]:
    """The same of the error on winners, as a factor."""
    best, then = min((figures["sft_loss"], step) for step, figures in validations[:-2])
    return then, min(figures["sft_loss"] for _, figures in validations[-2:]) / best, RISE


def _trained(history: History, name: str, step: int) -> float | None:
    """Training's own figure about a step: of the rows before it."""
    if name == "accuracy":
        return history.recent("implicit_accuracy", step)
    names = ("video_error", "audio_error")
    if history.config.method != "sft":  # of the reference's, which had the same draws
        names = ("video_error_win", "audio_error_win", "video_reference_win", "audio_reference_win")
    errors = [history.recent(name, step) for name in names]
    if None in errors:
        return None
    return sum(errors[:2]) / (sum(errors[2:]) or 1.0)


def falls_silent(history: History) -> str | None:
    """Samples of the run, against those of its beginning."""
    if len(history.samples) < 2:
        return None
    (_, first), (_, now) = history.samples[0], history.samples[-1]
    return silent(now.get("events_per_clip"), first.get("events_per_clip"), "at first")


def silent(sounds: float | None, expected: float | None, of: str = "in the data") -> str | None:
    """What is to be said of samples with so many sounds per clip, where there should be `expected`
    of them, as there are `of` the clips that these are compared with."""
    if not expected or sounds is None or sounds >= SILENT * expected:
        return None
    return (
        f"the model falls silent: its samples have {sounds:.2f} sounds per clip, {expected:.2f} "
        f"{of}; lower learning_rate or beta_audio, or raise sft_weight"
    )


CHECKS: tuple[Callable[[History], str | None], ...] = (
    steps_skipped,
    pairs_alike,
    winners_forgotten,
    margins_run_away,
    accuracy_stuck,
    too_few_clips,
    memorised,
    falls_silent,
)


# --- who says it ----------------------------------------------------------------------------------


def warnings_of(
    rows: Sequence[dict], config: TrainConfig, clips: int, processes: int = 1
) -> dict[str, str]:
    """What was to be said of a run with these rows in its log, by the check's name."""
    watchdog = Watchdog(config, clips, processes)
    for row in rows:
        watchdog(row, False)
    return watchdog.found


class Watchdog:
    """Shows each row of a run's log to the checks; says at once, and once, what they find."""

    def __init__(self, config: TrainConfig, clips: int, processes: int):
        batch = config.batch_size * config.accumulation * processes
        self.history = History(config, clips, batch)
        self.path = Path(config.output) / FILE
        self.found: dict[str, str] = {}

    @property
    def said(self) -> list[str]:
        return list(self.found.values())

    def __call__(self, row: dict, new: bool) -> None:
        """new: whether to say what is found; a run that goes on has said it already."""
        self.history.add(row)
        for check in CHECKS:
            if check.__name__ in self.found or not (sentence := check(self.history)):
                continue
            self.found[check.__name__] = f"step {row['step']}: {sentence}"
            if new:
                self._write()
                tqdm.write(f"warning: {self.found[check.__name__]}", file=sys.stderr)

    def sum_up(self) -> None:
        """Say all again, at the end."""
        self._write()
        if self.found:
            print("\n".join(["warnings of this run:", *self.said]), file=sys.stderr)

    def _write(self) -> None:
        if self.found:
            write_atomic(self.path, "".join(f"{line}\n" for line in self.said).encode())
        else:
            self.path.unlink(missing_ok=True)
