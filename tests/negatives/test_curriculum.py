import math

import pytest

from syncdpo.negatives.curriculum import SCHEDULES, curriculum

PROGRESS = [i / 100 for i in range(101)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_difficulty_never_falls_and_stays_in_range(name):
    schedule = curriculum(name)
    difficulty = [schedule(progress) for progress in PROGRESS]
    assert difficulty == sorted(difficulty)
    assert 0 <= difficulty[0] <= difficulty[-1] <= 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ramps_reach_one_at_their_share_of_the_training(name):
    schedule = curriculum(name)
    assert schedule(0.0) == 0
    assert schedule(0.4) == pytest.approx(0.5)
    assert schedule(0.79) < 1
    assert schedule(0.8) == schedule(1.0) == pytest.approx(1.0)
    assert curriculum(name, until=0.5)(0.5) == pytest.approx(1.0)


def test_cosine_is_slower_at_both_ends():
    linear, cosine = curriculum("linear"), curriculum("cosine")
    assert cosine(0.1) < linear(0.1)
    assert cosine(0.7) > linear(0.7)


def test_stages_share_the_training_equally():
    schedule = curriculum("stages", levels=(0.1, 0.5, 0.9, 1.0))
    assert [schedule(p) for p in (0, 0.24, 0.26, 0.51, 0.76, 1)] == [0.1, 0.1, 0.5, 0.9, 1.0, 1.0]


def test_constant():
    assert {curriculum("constant", difficulty=0.3)(p) for p in PROGRESS} == {0.3}


def learner(schedule, skill):
    """Preferences that hold (0.95) below the learner's skill and fail (0.6) above it."""
    path = []
    for step in range(400):
        difficulty = schedule(step / 400)
        schedule.update(0.95 if difficulty < skill else 0.6)
        path.append(schedule(step / 400))
    return path


@pytest.mark.parametrize("skill", [0.0, 0.3, 0.7])
def test_adaptive_rises_only_while_the_accuracy_holds(skill):
    path = learner(curriculum("adaptive"), skill)
    assert path == sorted(path)
    # It overshoots by the steps that the smoothed accuracy takes to fall below its target.
    assert skill <= path[-1] <= skill + 0.12
    assert path[-1] == path[200]


def test_adaptive_reaches_one_under_perfect_preferences_and_waits_under_poor_ones():
    perfect, poor = curriculum("adaptive"), curriculum("adaptive")
    for _ in range(100):
        perfect.update(1.0)
        poor.update(0.79)
    assert perfect(0.0) == 1.0
    assert poor(1.0) == 0.0


def test_adaptive_ignores_steps_without_a_valid_pair():
    schedule = curriculum("adaptive")
    schedule.update(0.9)
    before = schedule.state_dict()
    schedule.update(math.nan)
    assert schedule.state_dict() == before


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_goes_on_exactly(name):
    whole, first, second = curriculum(name), curriculum(name), curriculum(name)
    accuracies = [0.7 + 0.3 * ((7 * i) % 10) / 10 for i in range(60)]

    def play(schedule, steps):
        path = []
        for i in steps:
            path.append(schedule(i / 60))
            if name == "adaptive":
                schedule.update(accuracies[i])
        return path

    expected = play(whole, range(60))
    before = play(first, range(25))
    second.load_state_dict(first.state_dict())
    assert before + play(second, range(25, 60)) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curriculum("quadratic"), "name: expected one of linear"),
        (lambda: curriculum("linear", until=0.0), "until"),
        (lambda: curriculum("cosine", until=1.5), "until"),
        (lambda: curriculum("stages", levels=()), "levels"),
        (lambda: curriculum("stages", levels=(0.5, 2.0)), "levels"),
        (lambda: curriculum("constant", difficulty=-0.1), "difficulty"),
        (lambda: curriculum("adaptive", target=1.2), "target"),
        (lambda: curriculum("adaptive").update(1.5), "implicit_accuracy"),
        (lambda: curriculum("adaptive").load_state_dict({}), "state"),
        (lambda: curriculum("linear").load_state_dict({"difficulty": 1.0}), "state"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
