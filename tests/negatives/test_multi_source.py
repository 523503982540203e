"""One source of a mix loses its timing, from stems to the pair that a model trains on.

What runs here is the example in docs/rules.md, as it stands there.
"""

import re
from pathlib import Path

import pytest
import torch

from syncdpo import ops
from syncdpo.data.synthetic import draw_balls
from syncdpo.models.codec import BANDS, STEPS

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


@pytest.fixture(scope="module")
def example():
    _, section = PAGE.read_text().split("## More than one source")
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    return names


def test_only_the_chosen_source_moves(example):
    stems, source, sounds = example["stems"], example["source"], example["sounds"]
    clip = torch.arange(4)
    others = stems[clip, 1 - source]
    assert torch.equal(sounds[0], stems.sum(1))
    moved = example["distortion"].apply(stems[clip, source], example["samples"])
    torch.testing.assert_close(sounds[1] - others, moved, rtol=0, atol=1e-6)
    assert ((moved - stems[clip, source]).square().sum(1) > 0.5 * moved.square().sum(1)).all()


def test_its_bands_change_and_those_of_the_others_do_not(example):
    difference = (example["win"] - example["lose"]).square().unflatten(2, (STEPS, BANDS))
    change = difference.mean((1, 2))
    apart = 0
    for seed in range(4):
        bands = [ball.pitch + 3 for ball in draw_balls(seed, 2)]  # PITCHES begin at band 3
        moved = bands[example["source"][seed]]
        (other,) = set(bands) - {moved}
        assert change[seed, moved] > 1
        if abs(moved - other) > 1:
            apart += 1
            assert change[seed, other] < 0.01
    assert apart >= 2


def test_the_pair_trains(example):
    noisy, seed = example["noisy"], example["seed"]
    pictures = noisy[0].chunk(2)
    assert torch.equal(*pictures)
    predicted = [torch.zeros_like(x, requires_grad=True) for x in noisy]
    reference = [torch.full_like(x, 0.1) for x in noisy]
    loss, stats = ops.dpo_loss(predicted, reference, example["target"], beta=5.0, return_stats=True)
    loss.backward()
    assert torch.isfinite(loss)
    # The pictures are the same and so prefer neither; the sounds are not.
    assert stats.margin[0].abs().max() < 1e-5
    assert (stats.margin[1].abs() > 1e-5).all()
    assert predicted[1].grad.abs().amax((1, 2)).min() > 0
    assert len(seed) == 4
