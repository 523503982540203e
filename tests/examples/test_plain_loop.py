"""examples/plain_loop.py learns what the pairs teach, and nothing where they teach nothing."""

from types import SimpleNamespace

import torch
from from_examples import load

from syncdpo import ops


def test_the_implicit_accuracy_rises_on_pairs_not_seen_before():
    torch.manual_seed(0)
    accuracy = load("plain_loop").train(steps=60)
    assert accuracy[0] == 0.5  # policy and reference are the same
    assert sum(accuracy[-20:]) / 20 > 0.85


def test_the_target_is_what_the_noise_asks_for(monkeypatch):
    """Of each row ε − clean, with the ε that `paired_noise` mixed into that very row."""
    example, given = load("plain_loop"), []

    def noted(op):
        def call(*arguments, **options):
            result = op(*arguments, **options)
            given.append((arguments, result))
            return result

        return call

    noting = SimpleNamespace(
        paired_noise=noted(ops.paired_noise), dpo_loss=noted(ops.dpo_loss), Velocity=ops.Velocity
    )
    monkeypatch.setattr(example, "ops", noting)
    silent = torch.ones(8, 1, 1).index_fill(0, torch.tensor([3]), 0.0)
    flashes = example.clips
    monkeypatch.setattr(example, "clips", lambda batch: [x * silent for x in flashes(batch)])
    torch.manual_seed(0)
    example.train(steps=2, batch=8)
    for noised, compared in zip(given[0::2], given[1::2], strict=True):
        (*_, sigma, seed), noisy = noised
        policy, reference, target = compared[0]
        margin = 0.0
        for m, own in enumerate(target):
            epsilon = ops.noise((8, *noisy[m].shape[1:]), seed, stream=m).repeat(2, 1, 1)
            level = sigma.repeat(2)[:, None, None]
            velocity = (noisy[m] - own.clean) / level
            torch.testing.assert_close(level * velocity, level * (epsilon - own.clean))
            errors = [
                (p[m] - epsilon + own.clean).square().mean((1, 2)) for p in (policy, reference)
            ]
            win, lose = (errors[0] - errors[1]).chunk(2)
            margin = margin - 5.0 * (win - lose)
        loss, stats = compared[1]
        assert stats.weight[3] == 0  # no sound, no pair
        assert stats.weight.sum() > 0
        plain = -(stats.weight * torch.nn.functional.logsigmoid(margin)).mean()
        torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)


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
