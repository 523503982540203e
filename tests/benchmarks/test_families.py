"""The table of what can be found in each family: its arithmetic, in miniature."""

from scripts import module

from syncdpo.metrics import summarise

families = module("families")


def test_real_clips_reach_the_perfect_figure_and_exchanged_sounds_do_not():
    measured = families.measure("several", 6)
    f1 = {way: summarise(metrics)["f1"] for way, metrics in measured.metrics.items()}
    assert 0.75 < f1["perfect"] < 0.95  # a third is heard and never seen
    assert abs(f1["raw"] - f1["perfect"]) < 0.08
    assert abs(f1["codec"] - f1["perfect"]) < 0.08
    assert f1["another's sound"] < f1["codec"] - 0.1


def test_the_table_has_a_row_per_family_and_the_latents_range():
    found, ranges = families.report(["weak"], 3).split("\n\n")
    header, _, weak = found.splitlines()
    assert header.count("|") == weak.count("|") == 9
    assert "| 1.00 |" in weak  # nothing is heard that is not seen
    assert ranges.splitlines()[2].startswith("| weak | ")
