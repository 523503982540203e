"""How the comparison reads: tables in Markdown, of what `compare` wrote down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from syncdpo.demo.search import spread
from syncdpo.evidence.protocol import METHODS, QUESTIONS

LINES = {"real": "real clips"} | {name: method.label for name, method in METHODS.items()}
SFT = ("sft", "sft-equal-time")


def tables(content: dict) -> str:
    """Given pictures by family; own clips and prices; settings; what the curriculum is worth."""
    rows = content["table"]
    parts = [
        "Given pictures: F1 and mean onset error in ms, mean (least–most) of the seeds.",
        by_family(rows),
        "Own clips, sounds per clip given pictures, and what it took.",
        own_clips(rows),
        "What each method was settled on.",
        settings(content["settled"]),
    ]
    if questions := content.get("questions"):
        family = questions["family"]
        parts += [f"SyncDPO on {family} alone, one setting changed at a time.", asked(questions)]
    return "\n\n".join(parts)


def by_family(rows: Sequence[dict]) -> str:
    """A line for each method, a column for each family; at the end SyncDPO's share of the error of
    the better SFT, each by its mean."""
    families = list(rows[0]["families"])
    lines = [
        [label, *(_cell([row["families"][family] for row in of]) for family in families)]
        for label, of in _grouped(rows)
    ]
    share = [_share(rows, family) for family in families]
    return table(["", *families], [*lines, ["SyncDPO's error, of the better SFT's", *share]])


def own_clips(rows: Sequence[dict]) -> str:
    lines = []
    for label, of in _grouped(rows):
        own = "" if label == "real clips" else _cell(of, "own_")
        events = _spread(of, lambda row: row["events_per_clip"], ".2f")
        steps = f"{max(row['steps'] for row in of)}" if any(row["steps"] for row in of) else ""
        spent = _spread(of, lambda row: row["total_cpu_seconds"], ".0f") if steps else ""
        lines.append([label, own, events, steps, spent])
    return table(["", "own clips", "sounds per clip", "steps", "seconds of CPU"], lines)


def settings(settled: dict[str, dict]) -> str:
    lines = []
    for method, of in settled.items():
        weight = "" if METHODS[method].settings["method"] == "sft" else f"{of['sft_weight']:g}"
        ranked = of["ranked_by"]
        rate = f"{of['learning_rate']:g}"
        lines.append([LINES[method], of["weights"], rate, str(of["steps"]), weight, ranked])
    heads = ["", "weights", "learning rate", "steps", "sft_weight", "ranked by"]
    return table(heads, lines)


def asked(questions: dict) -> str:
    lines = []
    for name, values in QUESTIONS.items():
        for value in values:
            of = [r for r in questions["rows"] if (r["question"], r["value"]) == (name, value)]
            lines.append([f"{name}: {value}", _cell(of), _cell(of, "own_")])
    lines.append(["real clips", _cell(questions["real"]), ""])
    return table(["", "given pictures", "own clips"], lines)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def _grouped(rows: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    found = [(label, [r for r in rows if r["method"] == name]) for name, label in LINES.items()]
    return [(label, of) for label, of in found if of]


def _cell(rows: Sequence[dict], prefix: str = "") -> str:
    f1 = _spread(rows, lambda row: row[f"{prefix}f1"], ".2f")
    return f"{f1} · {_spread(rows, lambda row: row[f'{prefix}onset_error_ms'], '.0f')}"


def _spread(rows: Sequence[dict], value: Callable[[dict], float | None], form: str) -> str:
    """A dash where it is not known of every seed."""
    values = [value(row) for row in rows]
    return "—" if None in values else spread(values, form)


def _share(rows: Sequence[dict], family: str) -> str:
    def error(method: str) -> float | None:
        of = [r["families"][family]["onset_error_ms"] for r in rows if r["method"] == method]
        return None if not of or None in of else sum(of) / len(of)

    sft = [found for found in map(error, SFT) if found]
    ours = error("syncdpo")
    return f"{ours / min(sft):.2f}" if ours is not None and sft else "—"
