"""examples/plain_loop.py learns what the pairs teach, and nothing where they teach nothing."""

import torch
from from_examples import load


def test_the_implicit_accuracy_rises_on_pairs_not_seen_before():
    torch.manual_seed(0)
    accuracy = load("plain_loop").train(steps=60)
    assert accuracy[0] == 0.5  # policy and reference are the same
    assert sum(accuracy[-20:]) / 20 > 0.85


def test_it_stays_at_chance_where_sound_has_nothing_to_do_with_the_picture(monkeypatch):
    """Noise, of which no frame depends on another: shifted it is as good as before."""
    example = load("plain_loop")
    flashes = example.clips
    unrelated = staticmethod(lambda batch: (flashes(batch)[0], torch.randn(batch, 24, 1)))
    monkeypatch.setattr(example, "clips", unrelated)
    monkeypatch.setattr(example, "RULE", example.parse_rule("shift"))
    torch.manual_seed(0)
    accuracy = example.train(steps=60)
    assert abs(sum(accuracy[-30:]) / 30 - 0.5) < 0.06
