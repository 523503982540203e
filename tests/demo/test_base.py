"""How bases are made, in miniature."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from syncdpo.data.chance import generator
from syncdpo.data.families import FAMILIES
from syncdpo.data.synthetic import render
from syncdpo.demo import base
from syncdpo.demo.base import FIRST_SEED, RECIPES, MistimedClips, make_base
from syncdpo.models.tiny import Tiny


@pytest.fixture(scope="module")
def model():
    return Tiny(weights=None, config={"num_layers": 1})


def offset_of(index):
    return torch.rand((), generator=generator("offset", index)).item() - 0.5


def test_the_embedded_bases_clips_are_those_that_it_was_trained_on(model):
    clips = MistimedClips(model, RECIPES["impacts"])
    assert len(clips) == 3072
    expected = model.encode(render(FIRST_SEED + 5, offset=offset_of(5)).clip, "")
    assert all(torch.equal(clips[5][stream], expected[stream]) for stream in expected)


def test_a_base_of_all_families_takes_them_in_turn(model):
    clips = MistimedClips(model, RECIPES["all"])
    assert len(clips) % len(FAMILIES) == 0
    for of, family in enumerate(FAMILIES.values()):
        index = 4 * 3 + of
        clip = family(FIRST_SEED + 3, offset=offset_of(index)).clip
        expected = model.encode(clip, "")
        assert all(torch.equal(clips[index][stream], expected[stream]) for stream in expected)


def test_two_steps_make_a_base_that_loads(tmp_path):
    recipe = RECIPES["all"]
    settings = replace(recipe.settings, output=str(tmp_path / "run"), steps=2, batch_size=4)
    path = tmp_path / "bases" / "all.safetensors"
    make_base(replace(recipe, clips=8, settings=settings), path)
    assert path.stat().st_size < 8e6
    weights = load_file(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    loaded = Tiny(path).transformer.state_dict()
    assert all(torch.equal(loaded[name], weights[name].float()) for name in weights)


def test_a_base_of_other_steps_takes_no_bases_place(capsys):
    with pytest.raises(SystemExit) as stopped:
        base.main(["--families", "all", "--steps", "3"])
    assert stopped.value.code == 2
    assert "--output: expected a file for a base of another number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("families", "place"),
    [("impacts", "tiny_base.safetensors"), ("all", "tiny_families.safetensors")],
)
def test_each_base_has_its_place(families, place, monkeypatch):
    made = {}
    monkeypatch.setattr(base, "make_base", lambda recipe, output: made.update({output: recipe}))
    base.main(["--families", families])
    assert [path.name for path in made] == [place]
    assert list(made.values()) == [RECIPES[families]]
