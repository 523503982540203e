"""What the kernels are to reach on a GPU, and which measurement shows it.

Each goal is read off the rows of `benchmarks/bench_*.py` and of `benchmarks/ltx2_step.py`, as
`benchmarks/gpu_check.py` collects them; a row that was not measured gives no figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Goal(NamedTuple):
    """`figure` of the results; it is to be at least `least`, or at most `most`."""

    name: str
    figure: Callable[[dict], float]
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        return value >= self.least if self.most is None else value <= self.most

    @property
    def bound(self) -> str:
        return f"≥ {self.least:g}" if self.most is None else f"≤ {self.most:g}"


def of_copy(row: str) -> Callable[[dict], float]:
    return lambda results: results["benchmarks"][row]["of copy"]


def speedup(case: str, way: str) -> Callable[[dict], float]:
    """From clean latents to the gradient, as called."""

    def figure(results: dict) -> float:
        rows = results["benchmarks"]
        return rows[f"test_clean[{case}-{way}]"]["ms"] / rows[f"test_clean[{case}-syncdpo]"]["ms"]

    return figure


def kernels(results: dict) -> float:
    return results["benchmarks"]["test_loss[long-B4-syncdpo]"]["kernels"]


def peak_over_results(results: dict) -> float:
    """Of eight times a prediction's bytes that must move, x_t and the gradient are two."""
    row = results["benchmarks"]["test_clean[long-B4-syncdpo]"]
    return row["peak MiB"] / (row["must move MiB"] / 4)


def in_place(case: str) -> Callable[[dict], float]:
    row = f"test_replace_segments[{case}-in-place]"
    return lambda results: results["benchmarks"][row]["times as quick as"]["kernel"]


GOALS = [
    *(
        Goal(f"dpo_loss {way}: share of copy", of_copy(f"test_pass[long-B4-{way}-given]"), 0.90)
        for way in ("forward", "backward")
    ),
    *(
        Goal(
            f"dpo_loss {way}, Velocity: share of copy",
            of_copy(f"test_pass[long-B4-{way}-rebuilt]"),
            0.85,
        )
        for way in ("forward", "backward")
    ),
    Goal("clean → gradient: eager over ours", speedup("long-B4", "eager"), 6),
    Goal("clean → gradient: compiled over ours", speedup("long-B4", "compile"), 1.3),
    Goal("the same, one 5 s clip: eager over ours", speedup("clip-B1", "eager"), 6),
    Goal("the same, one 5 s clip: compiled over ours", speedup("clip-B1", "compile"), 1),
    Goal("kernels, both modalities, forward + backward", kernels, most=2),
    Goal("clean → gradient: peak over x_t + gradient", peak_over_results, most=1.01),
    *(
        Goal(f"warp, {case}: share of copy", of_copy(f"test_warp[{case}-auto]"), 0.85)
        for case in ("video", "packed", "audio", "time-last")
    ),
    *(
        Goal(f"{op}: share of copy", of_copy(f"test_scale_and_shift[{op}]"), 0.85)
        for op in ("scale", "shift")
    ),
    *(
        Goal(
            f"replace_segments, {case}: share of copy",
            of_copy(f"test_replace_segments[{case}-kernel]"),
            0.85,
        )
        for case in ("raw", "latents")
    ),
    *(
        Goal(f"replace_segments, {case}: in place over out of place", in_place(case), 3)
        for case in ("raw", "latents")
    ),
]


def table(results: dict) -> list[dict]:
    """Each goal with its figure and whether it is met; None where nothing was measured."""
    rows = []
    for goal in GOALS:
        try:
            value = round(goal.figure(results), 3)
        except (KeyError, TypeError):
            value = None
        met = None if value is None else goal.met(value)
        rows.append({"goal": goal.name, "bound": goal.bound, "measured": value, "met": met})
    return rows


def text(rows: list[dict]) -> str:
    marks = {True: "yes", False: "NO", None: "–"}
    width = max(len(row["goal"]) for row in rows)
    return "\n".join(
        f"{row['goal']:<{width}}  {row['bound']:>7}  "
        f"{'–' if row['measured'] is None else row['measured']:>8}  {marks[row['met']]}"
        for row in rows
    )
