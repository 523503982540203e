"""Rules: each draws distortions of a given difficulty, in seconds and rates.

Replace and Scale are SyncDPO's (arXiv 2605.12179); Shift, Warp and all ranges are this project's
own. Drawing is batched tensor arithmetic: no loop over samples, no wait for a device.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Generator, Tensor

from syncdpo.negatives.distortion import (
    REPLACE,
    RULES,
    SCALE,
    SHIFT,
    WARP,
    Distortion,
    output_times,
    select,
)
from syncdpo.ops._checks import check_choice, check_tensor

# A map is kept as this many source times, evenly spaced over the clip.
KNOTS = 65
# Seconds by which sound must lag, or lead, for people to notice (ITU-R BT.1359).
NOTICED_LAG, NOTICED_LEAD = 0.125, 0.045
# Ranges in seconds are those of clips this long or longer; they shrink with a shorter clip.
FULL_RANGE_SECONDS = 2.0
PLACEMENTS = ("anywhere", "sound")
# Placements that a pair may choose from, and the steps from one to the next: multiples of these
# irrational numbers fill the unit cube evenly.
TRIES = 8
STEPS = (0.8191725134, 0.6710436067, 0.5497004779)


Pair = tuple[Distortion, Distortion]


@dataclass(frozen=True)
class Setting:
    """What a rule draws for: difficulty, and three times in seconds, [B] float32 each.

    Distortions act on the first `duration` seconds of a clip; where a rule deals in whole frames,
    on the first `whole` seconds, and the two of a matched pair are at least `grain` apart.
    `generator` may live on another device; its numbers are then copied.
    """

    difficulty: Tensor
    duration: Tensor
    matched: Tensor
    whole: Tensor
    grain: Tensor
    generator: Generator | None

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on [0, 1), [B, *shape]."""
        device = self.duration.device
        origin = device if self.generator is None else self.generator.device
        size = (self.duration.shape[0], *shape)
        return torch.rand(size, generator=self.generator, device=origin).to(device)

    def sign(self) -> Tensor:
        return torch.where(self.uniform() < 0.5, -1.0, 1.0)

    def at(self, coarse: float, subtle: float) -> Tensor:
        """The value for each difficulty, [B]: `coarse` at 0, `subtle` at 1, linear between."""
        return coarse + self.difficulty * (subtle - coarse)

    def between(self, coarse: tuple[float, float], subtle: tuple[float, float]) -> Tensor:
        """Uniform in the range for each difficulty, [B]."""
        low, high = self.at(coarse[0], subtle[0]), self.at(coarse[1], subtle[1])
        return low + self.uniform() * (high - low)

    @property
    def shrinkage(self) -> Tensor:
        """How far ranges in seconds shrink with the clip, [B] in (0, 1]."""
        return (self.duration / FULL_RANGE_SECONDS).clamp(max=1)


class Rule:
    """Draws distortions. `draw` one for each sample, `draw_pair` φ₁ and φ₂ of a pair.

    `draw_tries` draws several pairs for each sample, from the same random numbers: a pair that a
    clip would leave without a difference to hear can give way to the next.
    """

    def draw(
        self,
        batch: int,
        difficulty: float | Tensor,
        duration: float | Tensor,
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Distortion:
        """One distortion per sample: `difficulty` in [0, 1] and `duration` in seconds, or [B]."""
        plain = torch.zeros(batch, dtype=torch.bool, device=device)
        return self.draw_pair(plain, difficulty, duration, generator=generator)[1]

    def draw_pair(
        self,
        matched: Tensor,
        difficulty: float | Tensor,
        duration: float | Tensor,
        *,
        whole: float | Tensor | None = None,
        grain: float | Tensor = 0.0,
        generator: Generator | None = None,
    ) -> Pair:
        """φ₁ and φ₂, exchangeable where `matched` [B] is true; elsewhere φ₁ is the identity.

        Both are apart by the amount that the difficulty asks for: in a matched pair by halves to
        either side, so that no more is distorted than has to be. They act on the first `duration`
        seconds, or on the first `whole` where the rule deals in whole frames (default: duration).
        """
        options = {"whole": whole, "grain": grain, "generator": generator}
        return self.draw_tries(matched, difficulty, duration, **options)[0]

    def draw_tries(
        self,
        matched: Tensor,
        difficulty: float | Tensor,
        duration: float | Tensor,
        *,
        whole: float | Tensor | None = None,
        grain: float | Tensor = 0.0,
        generator: Generator | None = None,
    ) -> list[Pair]:
        """The pair that `draw_pair` draws, then those that may take its place."""
        difficulty = per_sample("difficulty", difficulty, matched)
        duration = per_sample("duration", duration, matched)
        whole = duration if whole is None else per_sample("whole", whole, matched)
        grain = per_sample("grain", grain, matched)
        return self._tries(Setting(difficulty, duration, matched, whole, grain, generator))

    def _tries(self, setting: Setting) -> list[Pair]:
        raise NotImplementedError


@dataclass(frozen=True)
class _WarpRule(Rule):
    """A rule that warps: the displacement at each output time, for any amount of one draw."""

    code: ClassVar[int]
    boundary: str = "wrap"

    def _tries(self, setting: Setting) -> list[Pair]:
        displacement = self._displacement(setting)
        amount = torch.where(setting.matched, -0.5, 0.0)[:, None]
        first = self._distortion(setting.duration, displacement(amount))
        return [(first, self._distortion(setting.duration, displacement(amount + 1.0)))]

    def _displacement(self, setting: Setting) -> Callable[[Tensor], Tensor]:
        """Source time minus output time, [B, KNOTS], as a function of the amount [B, 1]."""
        raise NotImplementedError

    def _distortion(self, duration: Tensor, displacement: Tensor) -> Distortion:
        nothing = torch.zeros_like(duration)
        return Distortion(
            knots=output_times(duration, KNOTS) + displacement,
            start=nothing,
            length=nothing,
            donor_start=nothing,
            duration=duration,
            rule=torch.full_like(duration, self.code).long(),
            boundary=self.boundary,
            replaces=False,
        )


@dataclass(frozen=True)
class Shift(_WarpRule):
    """The stream is moved as a whole: source = output - offset.

    |offset| is drawn from `coarse` (seconds) at difficulty 0 to `subtle` at 1, to either side.
    """

    code: ClassVar[int] = SHIFT
    coarse: tuple[float, float] = (0.4, 1.0)
    subtle: tuple[float, float] = (0.10, 0.20)

    def _displacement(self, setting: Setting) -> Callable[[Tensor], Tensor]:
        sign = setting.sign()
        # In a matched pair either stream may be the later one: one floor keeps φ₁, φ₂ exchangeable.
        lags = setting.matched | (sign > 0)
        noticed = torch.where(lags, NOTICED_LAG, NOTICED_LEAD)
        size = (setting.between(self.coarse, self.subtle) * setting.shrinkage).maximum(noticed)
        offset = (sign * size)[:, None]
        return lambda amount: (-amount * offset).expand(-1, KNOTS)


@dataclass(frozen=True)
class Scale(_WarpRule):
    """The stream plays faster or slower around a fixed moment: source = a + rate (output - a).

    `rate` is drawn from `coarse` to `subtle`, or is the inverse of such a rate; a is any moment of
    the clip. Amounts count in log rate.
    """

    code: ClassVar[int] = SCALE
    coarse: tuple[float, float] = (1.5, 2.0)
    subtle: tuple[float, float] = (1.08, 1.2)

    def _displacement(self, setting: Setting) -> Callable[[Tensor], Tensor]:
        log_rate = (setting.between(self.coarse, self.subtle).log() * setting.sign())[:, None]
        fixed = (setting.uniform() * setting.duration)[:, None]
        from_fixed = output_times(setting.duration, KNOTS) - fixed
        return lambda amount: (amount * log_rate).expm1() * from_fixed


@dataclass(frozen=True)
class Warp(_WarpRule):
    """Time runs unevenly between fixed ends, over 4 to 8 knots, and never backwards.

    The largest displacement is `coarse` seconds at difficulty 0, `subtle` at 1, or less where the
    source would run slower than `slowest` times or faster than 2 - `slowest` times.
    """

    code: ClassVar[int] = WARP
    coarse: float = 0.5
    subtle: float = 0.12
    knots: tuple[int, int] = (4, 8)
    slowest: float = 0.25

    def _displacement(self, setting: Setting) -> Callable[[Tensor], Tensor]:
        shape = self._bridge(setting)
        tempo = shape.diff(dim=1) * (KNOTS - 1) / setting.duration[:, None]
        steepest = tempo.abs().amax(1, keepdim=True)
        size = (setting.at(self.coarse, self.subtle) * setting.shrinkage)[:, None]
        size = size.minimum((1 - self.slowest) / steepest)
        return lambda amount: amount * size * shape

    def _bridge(self, setting: Setting) -> Tensor:
        """A random walk of as many steps as segments, 0 at both ends, largest value 1, [B, KNOTS].

        A walk, not independent knots: for one displacement it asks for the least haste.
        """
        fewest, most = self.knots
        segments = fewest - 1 + (setting.uniform() * (most - fewest + 1)).floor()
        place = torch.arange(KNOTS, device=segments.device) / (KNOTS - 1) * segments[:, None]
        step = setting.uniform(most - 1) - 0.5
        walk = torch.nn.functional.pad(step.cumsum(1), (1, 0))
        below = place.floor().clamp(max=most - 2).long()
        path = walk.gather(1, below) + (place - below) * step.gather(1, below)
        bridge = path - path[:, -1:] * (place / segments[:, None])
        return bridge / bridge.abs().amax(1, keepdim=True).clamp(min=1e-6)


@dataclass(frozen=True)
class Replace(Rule):
    """A segment is overwritten by one from another moment of the same clip.

    Its share of the clip is drawn from `coarse` to `subtle`. The places of the segment and of two
    donors are apart by at least `coarse_gap` seconds at difficulty 0 and `subtle_gap` at 1, as far
    as the clip has room for it. A plain pair uses one donor, a matched pair one for each of its
    two: both then have their seams at the same times.

    `placement`: "anywhere", or "sound", which places them where winner and loser come out
    different: of `TRIES` placements the first that sets unlike stretches against each other (see
    `PairDraw.make`). The lengths, and what other rules draw, stay the same.
    """

    coarse: tuple[float, float] = (0.5, 0.8)
    subtle: tuple[float, float] = (0.1, 0.25)
    coarse_gap: float = 0.4
    subtle_gap: float = 0.15
    crossfade: float = 0.0
    placement: str = "anywhere"

    def __post_init__(self) -> None:
        check_choice("placement", self.placement, PLACEMENTS)

    def _tries(self, setting: Setting) -> list[Pair]:
        duration, grain = setting.whole, setting.grain
        length = setting.between(self.coarse, self.subtle) * duration
        length = length.minimum(duration - 3 * grain).maximum(grain)
        pairs = []
        for start, donor, other in self._places(setting, duration - length):
            untouched = self._distortion(duration, start, torch.zeros_like(length), start)
            first = self._distortion(duration, start, length, donor)
            second = self._distortion(duration, start, length, other)
            pairs.append((select(setting.matched.long(), [untouched, first]), second))
        return pairs

    def _places(self, setting: Setting, room: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per try three starts within `room` seconds, in random order, no two closer than the gap.

        Every try has the same order: exchanging the donors of one exchanges those of all, and so
        of the one that a clip chooses. Matched pairs stay exchangeable, whatever the clip.
        """
        gap = setting.at(self.coarse_gap, self.subtle_gap) * setting.shrinkage
        gap = gap.maximum(setting.grain * 1.001).minimum(room / 2)[:, None]
        numbers, order = setting.uniform(3), setting.uniform(3).argsort(1)
        step = torch.tensor(STEPS, device=room.device)
        places = []
        for i in range(TRIES if self.placement == "sound" else 1):
            ordered = (numbers + i * step).frac().sort(1).values * (room[:, None] - 2 * gap)
            ordered = ordered + gap * torch.arange(3, device=room.device)
            places.append(ordered.gather(1, order).unbind(1))
        return places

    def _distortion(
        self, duration: Tensor, start: Tensor, length: Tensor, donor_start: Tensor
    ) -> Distortion:
        return Distortion(
            knots=output_times(duration, KNOTS),
            start=start,
            length=length,
            donor_start=donor_start,
            duration=duration,
            rule=torch.full_like(duration, REPLACE).long(),
            crossfade=self.crossfade,
            warps=False,
        )


class Mixture(Rule):
    """Each sample draws from one of `rules`, by `weights` (default: equally)."""

    def __init__(self, rules: Sequence[Rule], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(rules) if weights is None else list(weights)
        if not rules or len(weights) != len(rules):
            raise ValueError(
                f"weights: expected one for each of at least one rule, got {len(weights)} for "
                f"{len(rules)}"
            )
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"weights: expected none below 0 and a finite sum, got {weights}")
        boundaries = {rule.boundary for rule in rules if isinstance(rule, _WarpRule)}
        if len(boundaries) > 1:
            raise ValueError(f"rules: expected one boundary for all, got {sorted(boundaries)}")
        self.rules = tuple(rules)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def __repr__(self) -> str:
        return f"Mixture({list(self.rules)}, weights={list(self.weights)})"

    def _tries(self, setting: Setting) -> list[Pair]:
        chance = setting.uniform()
        borders = itertools.accumulate(self.weights[:-1])
        choice = sum(
            ((chance >= border).long() for border in borders), torch.zeros_like(chance).long()
        )
        tries = [rule._tries(setting) for rule in self.rules]
        count = max(map(len, tries))
        # A rule with fewer tries repeats its last.
        rounds = ([own[min(i, len(own) - 1)] for own in tries] for i in range(count))
        return [
            tuple(select(choice, options) for options in zip(*pairs, strict=True))
            for pairs in rounds
        ]


def parse_rule(text: str) -> Rule:
    """The rule of that name, or the equal mixture of several joined by "+", as "replace+scale".

    Options as in Python: "replace(placement='sound', crossfade=0.04) + scale".
    """
    try:
        rules = [_parse_one(node) for node in _summands(ast.parse(text.strip(), mode="eval").body)]
    except (SyntaxError, KeyError):
        raise ValueError(
            f"rule: expected {', '.join(RULES)} or some joined by +, got {text!r}"
        ) from None
    return rules[0] if len(rules) == 1 else Mixture(rules)


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _parse_one(node: ast.expr) -> Rule:
    """A name, or a call of one with plain values by keyword; KeyError for anything else."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    kind = dict(zip(RULES, (Shift, Scale, Warp, Replace), strict=True))[ast.unparse(call.func)]
    known = [field.name for field in fields(kind)]
    plain = all(isinstance(o.value, (ast.Constant, ast.Tuple)) for o in call.keywords)
    if call.args or not plain or not {o.arg for o in call.keywords} <= set(known):
        expected, got = ", ".join(known), ast.unparse(node)
        raise ValueError(f"rule: expected plain values for any of {expected}, got {got!r}")
    return kind(**{o.arg: ast.literal_eval(o.value) for o in call.keywords})


def per_sample(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """`value`, a number or [B], as [B] float32 beside `like`, which is [B] too."""
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=like.shape, device=like.device)
        return value.float()
    expected, fits = {
        "difficulty": ("in [0, 1]", 0 <= value <= 1),
        "duration": ("of seconds above 0", 0 < value < math.inf),
        "whole": ("of seconds above 0", 0 < value < math.inf),
        "grain": ("of seconds, 0 or more", 0 <= value < math.inf),
    }[name]
    if not fits:
        raise ValueError(f"{name}: expected a number {expected}, got {value}")
    return torch.full(like.shape, float(value), device=like.device)
