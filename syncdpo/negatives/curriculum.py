"""Difficulty of the negatives over training: d in [0, 1], 0 coarse and 1 subtle."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Schedule:
    """A difficulty for each progress in [0, 1] of the training; called once per step."""

    def __call__(self, progress: float) -> float:
        raise NotImplementedError

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs to go on exactly; nothing for a function of progress alone."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"state: expected the keys {sorted(self.state_dict())}, got {sorted(state)}"
            )


@dataclass
class Linear(Schedule):
    """d = min(progress / until, 1)."""

    until: float = 0.8

    def __post_init__(self) -> None:
        _check_share("until", self.until, lowest_excluded=True)

    def __call__(self, progress: float) -> float:
        return _clip(progress / self.until)


@dataclass
class Cosine(Linear):
    """d = (1 - cos(pi min(progress / until, 1))) / 2: slow at both ends."""

    def __call__(self, progress: float) -> float:
        return (1 - math.cos(math.pi * super().__call__(progress))) / 2


@dataclass
class Stages(Schedule):
    """Equal shares of the training, one for each of the `levels`."""

    levels: tuple[float, ...] = (0.0, 0.5, 1.0)

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels: expected at least one difficulty, got none")
        for level in self.levels:
            _check_share("levels", level)

    def __call__(self, progress: float) -> float:
        stage = int(_clip(progress) * len(self.levels))
        return self.levels[min(stage, len(self.levels) - 1)]


@dataclass
class Constant(Schedule):
    """d = difficulty."""

    difficulty: float = 0.5

    def __post_init__(self) -> None:
        _check_share("difficulty", self.difficulty)

    def __call__(self, progress: float) -> float:
        return self.difficulty


@dataclass
class Adaptive(Schedule):
    """Rises by `step` after each update while the implicit accuracy stays above `target`.

    The accuracy is smoothed, a <- memory a + (1 - memory) accuracy from a = 0.5 (a guess), so one
    lucky batch does not harden the task. The difficulty never falls.
    """

    target: float = 0.8
    step: float = 0.02
    memory: float = 0.8
    difficulty: float = 0.0
    accuracy: float = 0.5

    def __post_init__(self) -> None:
        for name in ("target", "step", "memory", "difficulty", "accuracy"):
            _check_share(name, getattr(self, name))

    def __call__(self, progress: float) -> float:
        return self.difficulty

    def update(self, implicit_accuracy: float) -> None:
        """Take in one step's share of pairs whose winner is preferred; NaN: no pair was valid."""
        if math.isnan(implicit_accuracy):
            return
        _check_share("implicit_accuracy", implicit_accuracy)
        self.accuracy = self.memory * self.accuracy + (1 - self.memory) * implicit_accuracy
        if self.accuracy > self.target:
            self.difficulty = _clip(self.difficulty + self.step)

    def state_dict(self) -> dict[str, float]:
        return {"difficulty": self.difficulty, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.difficulty, self.accuracy = state["difficulty"], state["accuracy"]


SCHEDULES = {
    "linear": Linear,
    "cosine": Cosine,
    "stages": Stages,
    "constant": Constant,
    "adaptive": Adaptive,
}


def curriculum(name: str = "linear", **options) -> Schedule:
    """The schedule of that name, one of `SCHEDULES`; `options` are its fields."""
    if name not in SCHEDULES:
        raise ValueError(f"name: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name](**options)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _check_share(name: str, value: float, *, lowest_excluded: bool = False) -> None:
    if not 0 <= value <= 1 or (lowest_excluded and value == 0):
        interval = "(0, 1]" if lowest_excluded else "[0, 1]"
        raise ValueError(f"{name}: expected a number in {interval}, got {value}")
