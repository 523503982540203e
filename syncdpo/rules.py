"""Rules: each draws distortions of a given difficulty, in seconds and rates.

Replace and Scale are SyncDPO's (arXiv 2605.12179); Shift, Warp and all ranges are this project's
own. Drawing is batched tensor arithmetic: no loop over samples, no wait for a device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from syncdpo.distortion import (
    REPLACE,
    RULES,
    SCALE,
    SHIFT,
    WARP,
    Distortion,
    output_times,
    select,
)
from syncdpo.ops._checks import check_tensor

# A map is kept as this many source times, evenly spaced over the clip.
KNOTS = 65
# Seconds by which sound must lag, or lead, for people to notice (ITU-R BT.1359).
NOTICED_LAG, NOTICED_LEAD = 0.125, 0.045
# Ranges in seconds are those of clips this long or longer; they shrink with a shorter clip.
FULL_RANGE_SECONDS = 2.0


@dataclass(frozen=True)
class Setting:
    """What a rule draws for: difficulty, duration and grain (seconds), [B] float32 each.

    Two distortions of a matched pair are at least `grain` apart where a rule deals in whole
    frames. `generator` may live on another device; its numbers are then copied.
    """

    difficulty: Tensor
    duration: Tensor
    matched: Tensor
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
    """Draws distortions. `draw` one for each sample, `draw_pair` φ₁ and φ₂ of a pair."""

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
        grain: float | Tensor = 0.0,
        generator: Generator | None = None,
    ) -> tuple[Distortion, Distortion]:
        """φ₁ and φ₂, exchangeable where `matched` [B] is true; elsewhere φ₁ is the identity.

        Both are apart by the amount that the difficulty asks for: in a matched pair by halves to
        either side, so that no more is distorted than has to be.
        """
        numbers = (("difficulty", difficulty), ("duration", duration), ("grain", grain))
        difficulty, duration, grain = (per_sample(*number, matched) for number in numbers)
        return self._pair(Setting(difficulty, duration, matched, grain, generator))

    def _pair(self, setting: Setting) -> tuple[Distortion, Distortion]:
        raise NotImplementedError


@dataclass(frozen=True)
class _WarpRule(Rule):
    """A rule that warps: the displacement at each output time, for any amount of one draw."""

    code: ClassVar[int]
    boundary: str = "wrap"

    def _pair(self, setting: Setting) -> tuple[Distortion, Distortion]:
        displacement = self._displacement(setting)
        first = torch.where(setting.matched, -0.5, 0.0)
        return tuple(
            self._distortion(setting.duration, displacement(amount[:, None]))
            for amount in (first, first + 1.0)
        )

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
    """

    coarse: tuple[float, float] = (0.5, 0.8)
    subtle: tuple[float, float] = (0.1, 0.25)
    coarse_gap: float = 0.4
    subtle_gap: float = 0.15
    crossfade: float = 0.0

    def _pair(self, setting: Setting) -> tuple[Distortion, Distortion]:
        duration, grain = setting.duration, setting.grain
        length = setting.between(self.coarse, self.subtle) * duration
        length = length.minimum(duration - 3 * grain).maximum(grain)
        start, donor, other = self._places(setting, duration - length)
        untouched = self._distortion(duration, start, torch.zeros_like(length), start)
        first = self._distortion(duration, start, length, donor)
        second = self._distortion(duration, start, length, other)
        return select(setting.matched.long(), [untouched, first]), second

    def _places(self, setting: Setting, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three starts within `room` seconds, in random order, no two closer than the gap."""
        gap = setting.at(self.coarse_gap, self.subtle_gap) * setting.shrinkage
        gap = gap.maximum(setting.grain * 1.001).minimum(room / 2)[:, None]
        ordered = setting.uniform(3).sort(1).values * (room[:, None] - 2 * gap)
        ordered = ordered + gap * torch.arange(3, device=room.device)
        shuffled = ordered.gather(1, setting.uniform(3).argsort(1))
        return shuffled.unbind(1)

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

    def _pair(self, setting: Setting) -> tuple[Distortion, Distortion]:
        chance = setting.uniform()
        borders = itertools.accumulate(self.weights[:-1])
        choice = sum(
            ((chance >= border).long() for border in borders), torch.zeros_like(chance).long()
        )
        firsts, seconds = zip(*(rule._pair(setting) for rule in self.rules), strict=True)
        return select(choice, firsts), select(choice, seconds)


def parse_rule(text: str) -> Rule:
    """The rule of that name, or the equal mixture of several joined by "+", as "replace+scale"."""
    kinds = dict(zip(RULES, (Shift, Scale, Warp, Replace), strict=True))
    names = text.split("+")
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise ValueError(f"rule: expected {', '.join(RULES)} or some joined by +, got {text!r}")
    rules = [kinds[name]() for name in names]
    return rules[0] if len(rules) == 1 else Mixture(rules)


def per_sample(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """`value`, a number or [B], as [B] float32 beside `like`, which is [B] too."""
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=like.shape, device=like.device)
        return value.float()
    expected, fits = {
        "difficulty": ("in [0, 1]", 0 <= value <= 1),
        "duration": ("of seconds above 0", 0 < value < math.inf),
        "grain": ("of seconds, 0 or more", 0 <= value < math.inf),
    }[name]
    if not fits:
        raise ValueError(f"{name}: expected a number {expected}, got {value}")
    return torch.full(like.shape, float(value), device=like.device)
