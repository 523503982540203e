"""Settings: from a file and back, and every wrong one named."""

import pytest

from syncdpo.training.config import TrainConfig, dump_config, load_config


def test_what_is_shown_can_be_read_back(tmp_path):
    config = TrainConfig(method="sft", learning_rate=1e-5, lora_rank=16, resume=True)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_yaml_notations_of_a_float(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nbeta_audio: 500\n")
    config = load_config(path)
    assert (config.learning_rate, config.beta_audio) == (1e-4, 500.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-4", "expected a setting, got 'learning_rat'; there are data, "),
        ("steps: many", "steps: expected int, got 'many'"),
        ("steps: 2.5", r"steps: expected int, got 2\.5"),
        ("resume: 1", "resume: expected bool, got 1"),
        ("cache_reference: true", "cache_reference: expected int, got True"),
        ("beta_audio: high", "beta_audio: expected float, got 'high'"),
        ("- steps", r"expected `setting: value` lines, got \['steps'\]"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_cached_reference_says_how_many_draws_there_are():
    assert TrainConfig().draws_per_clip == 0
    assert TrainConfig(draws=3).draws_per_clip == 3
    assert TrainConfig(cache_reference=3).draws_per_clip == 3
    assert TrainConfig(draws=3, cache_reference=3).draws_per_clip == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ppo"}, "method: expected sft, syncdpo, dpo, got 'ppo'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected more than 0, got nan"),
        ({"beta_audio": -1.0}, r"beta_audio: expected at least 0, got -1\.0"),
        ({"matched": 1.5}, r"matched: expected 0 to 1, got 1\.5"),
        ({"rules": "shift+blur"}, "blur"),
        ({"curriculum": "steep"}, "curriculum: expected linear"),
        ({"validation": 1.0}, r"validation: expected 0 to below 1, got 1\.0"),
        ({"validation": 0.1, "validation_data": "x"}, "expected 0 beside validation_data, got 0.1"),
        ({"validate_every": -1}, "validate_every: expected at least 0, got -1"),
        ({"patience": -1}, "patience: expected at least 0, got -1"),
        ({"keep": "first"}, "keep: expected last, best, got 'first'"),
        ({"winner_bound": 0.0}, r"winner_bound: expected more than 0, got 0\.0"),
        ({"cache_reference": -1}, "cache_reference: expected at least 0, got -1"),
        ({"cache_reference": 2, "draws": 3}, "as draws says, 3, got 2"),
        ({"draws": 2, "curriculum": "adaptive"}, "draws: expected 0 with the adaptive"),
        ({"cache_reference": 2, "curriculum": "adaptive"}, "cache_reference: expected 0 with the"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
