"""What the sweep prints of its rows: the table, the settings that rows share, what failed."""

from __future__ import annotations

import statistics

import sass
from sweep_variants import label


def print_all(results: dict, dry_run: bool) -> None:
    lines = compiled if dry_run else timed
    if table := lines(results["rows"]):
        sass.print_table(table)
    if shared := together(results["rows"]):
        print("\nof settings that several rows share:")
        sass.print_table(shared)
    for line in failures(results["rows"]):
        print(f"not timed, since it failed: {line}")
    for line in results["left_out"]:
        print(f"left out: {line}")


def compiled(rows: list[dict]) -> list[dict]:
    """A line for each setting, the present one first."""
    return [
        {
            "kernel": row["kernel"],
            "shape": row["shape"],
            "setting": label(entry.get("setting", {})),
            "registers": entry.get("registers"),
            "spill_bytes": entry.get("spill_bytes"),
        }
        for row in rows
        for entry in (row, *row["candidates"])
    ]


def timed(rows: list[dict]) -> list[dict]:
    """A line for each row: the present setting and the best."""
    return [
        {
            "kernel": row["kernel"],
            "shape": row["shape"],
            "present": label(row["present"]),
            "ms": rounded(row["ms"], 4),
            "GB/s": speed(row, "ms"),
            "best": None if row["best"] is None else label(row["best"]),
            "its ms": rounded(row["best_ms"], 4),
            "its GB/s": speed(row, "best_ms"),
            "ratio": rounded(row["ratio"], 3),
        }
        for row in rows
    ]


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def speed(row: dict, key: str) -> float | None:
    return None if row[key] is None else round(row["moved"] / row[key] / 1e6, 1)


def together(rows: list[dict]) -> list[dict]:
    """Settings that several kernels or shapes share, as one constant serves them all: how many
    rows, the geometric mean of their ratios and the worst of them."""
    ratios: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        for entry in row["candidates"]:
            if "ratio" in entry:
                ratios.setdefault(label(entry["setting"]), []).append((entry["ratio"], place(row)))
    lines = [
        {
            "setting": setting,
            "rows": len(own),
            "mean ratio": round(statistics.geometric_mean(ratio for ratio, _ in own), 3),
            "worst": round(max(own)[0], 3),
            "worst in": max(own)[1],
        }
        for setting, own in ratios.items()
        if len(own) > 1
    ]
    return sorted(lines, key=lambda line: line["mean ratio"])


def failures(rows: list[dict]) -> list[str]:
    said = []
    for row in rows:
        if row["wrong"]:
            said.append(f"{place(row)}, as it is: {row['wrong']}")
        for entry in row["candidates"]:
            if entry["failure"]:
                said.append(f"{place(row)}, {label(entry['setting'])}: {entry['failure']}")
    return said


def place(row: dict) -> str:
    return f"{row['kernel']}, {row['shape']}"
