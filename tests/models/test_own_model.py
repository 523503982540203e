"""A user's own model by its name: found, told its options, and refused for what it lacks."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from documented_model import BLOCKS, own_class, write_model
from processes import PYTHONPATH

from syncdpo.data import ClipFormat
from syncdpo.models import load_model
from syncdpo.models.members import check_members
from syncdpo.models.own import is_own
from syncdpo.negatives import Timeline
from syncdpo.training import TrainConfig
from syncdpo.training.publish import on_hub, shareable


@pytest.fixture
def write(tmp_path, monkeypatch):
    """text → the name of a module of its own in the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text, name=None):
        name = name or f"own_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return name

    return write


def refused(name, match, **options):
    with pytest.raises(ValueError, match=match) as told:
        load_model(name, **options)
    assert "\n" not in str(told.value)


def test_the_class_of_the_page_has_about_sixty_lines():
    assert 50 <= BLOCKS[1].count("\n") + 1 <= 65


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("my_model:Own", True), ("package.my_model:Own", True), ("folder/my_model.py:Own", True),
        ("../my model.py:large", True), ("my_model.py", True), ("tiny", False),
        ("Lightricks/LTX-2", False), ("ltx-2-19b-dev.safetensors", False),
        ("C:\\models\\ltx", False),
    ],
)  # fmt: skip
def test_a_name_tells_whose_model_it_is(name, own):
    assert is_own(name) == own


def test_a_folder_of_that_name_is_no_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model:Own").mkdir()
    assert not is_own("my_model:Own")


def test_it_is_found_in_the_working_folder_and_by_its_path(write, tmp_path):
    name = write("\n\n".join(BLOCKS))
    by_module = load_model(f"{name}:Own")
    by_path = load_model(write_model(tmp_path))
    assert type(by_module).__name__ == type(by_path).__name__ == "Own"


def test_files_of_one_name_are_two_models_and_find_what_is_beside_them(tmp_path):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"beside_{number}.py").write_text(f"NUMBER = {number}")
        write_model(folder, more=f"import beside_{number}\nOwn.number = beside_{number}.NUMBER")
    numbers = [load_model(f"{tmp_path}/{n}/own_model.py:Own").number for n in (1, 2)]
    assert numbers == [1, 2]


def test_its_random_weights_are_the_same_every_time_and_nobody_else_s_numbers_change(tmp_path):
    name = write_model(tmp_path)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first = load_model(name).transformer.state_dict()
    assert torch.equal(torch.randn(3), expected)
    second = load_model(name).transformer.state_dict()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


# --- options --------------------------------------------------------------------------------------


TAKING = """
class Taking(Own):
    def __init__(self, frames=24, *, sigma="shared"):
        super().__init__()
        self.told = frames, sigma

class Everything(Own):
    def __init__(self, **options):
        super().__init__()
        self.told = options

class Needing(Own):
    def __init__(self, checkpoint):
        super().__init__()

def large():
    return Needing("large.safetensors")
"""


def test_it_is_told_what_it_takes(tmp_path):
    file = write_model(tmp_path, more=TAKING).rpartition(":")[0]
    asked = {"sigma": "separate", "allow_distilled": False}  # which training says of every model
    assert load_model(f"{file}:Taking", **asked).told == (24, "separate")
    assert load_model(f"{file}:Taking", frames=9).told == (9, "shared")
    assert load_model(f"{file}:Everything", **asked).told == asked
    load_model(f"{file}:Own", **asked)
    load_model(f"{file}:large")
    refused(f"{file}:Own", r"sigma: expected options that .*:Own takes \(none\), got 'shared'",
            sigma="shared")  # fmt: skip
    refused(f"{file}:Taking", r"text_encoder: .* takes \(frames, sigma\), got 'x'",
            text_encoder="x")  # fmt: skip
    refused(f"{file}:Own", "allow_distilled: expected options", allow_distilled=True)
    refused(f"{file}:Needing", r"needs more than it was given \(missing a required argument: "
            r"'checkpoint'\); name a function .*def large\(\): return Needing")  # fmt: skip


def test_what_training_tells_of_every_model_reaches_those_that_take_it(tmp_path):
    file = write_model(tmp_path, more=TAKING).rpartition(":")[0]
    options = TrainConfig(model=f"{file}:Everything", shift_bound=7).model_options
    assert load_model(f"{file}:Everything", **options).told == {
        "shift_bound": 7, "sigma": "separate", "allow_distilled": False,
    }  # fmt: skip


# --- what cannot be found -------------------------------------------------------------------------


def test_what_is_not_there_is_said(write, tmp_path):
    refused("no_such_module:Own", rf"expected a module no_such_module, found in {tmp_path} or")
    refused("no.such.module:Own", "expected a module no.such.module")
    refused("none/my_model.py:Own", "expected a file none/my_model.py, got none there")
    name = write("large = 3")
    refused(f"{name}:Own", rf"model: {name} has no Own, got '{name}:Own'")
    refused(f"{name}:large", "expected a class, or a function .* got .* which is int")
    refused(f"{name}.py", rf"expected {name}\.py:Class, the class in that file")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\nimport no_such_library", "ModuleNotFoundError: No module .* line 2"),
        ("def broken(:", "SyntaxError: .*"),
        ("open('no-weights.bin')", r"FileNotFoundError: .*no-weights\.bin"),
        ("\n\nraise RuntimeError('no GPU')", r"RuntimeError: no GPU \(\w+\.py, line 3\)"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(write, tmp_path, text, reason):
    name = write(text)
    refused(f"{name}:Own", f"model: {name} cannot be imported: {reason}")
    for _ in range(2):  # not half imported after the first time either
        refused(f"{name}.py:Own", rf"model: {name}\.py cannot be imported: {reason}")


def test_wrong_versions_beneath_it_are_told_as_elsewhere(write):
    name = write("from diffusers import NoSuchPipeline")
    program = f"from syncdpo.models import load_model\nload_model({name + ':Own'!r})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env={"PYTHONPATH": PYTHONPATH, "PATH": ""},
    )  # fmt: skip
    assert "WrongVersions: versions: expected diffusers" in run.stderr


# --- what it lacks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_class(tmp_path_factory.mktemp("own"))


def lacking(own, **members):
    return type("Own", (own,), members)()


def test_missing_members_are_named_together():
    class Half:
        clip_format = velocity_sign = None

        def encode(self):
            pass

    with pytest.raises(
        ValueError, match=r"expected Half to follow .* it has no transformer"
    ) as told:
        check_members(Half())
    assert "timelines, lora_targets" in str(told.value)
    assert "save_weights or load_weights; docs/models.md" in str(told.value)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"encode": 3}, "encode: expected a method of Own, got int"),
        ({"clip_format": (2, 12)}, r"clip_format: expected a ClipFormat of Own, got \(2, 12\)"),
        ({"timelines": Timeline(12, 6.0)}, "timelines: expected two Timelines"),
        ({"timelines": (Timeline(12, 6.0),)}, "timelines: expected two Timelines"),
        ({"timelines": (12, 50)}, "timelines: expected two Timelines"),
        ({"velocity_sign": 0}, r"velocity_sign: expected \+1 for ε − x, or −1 for x − ε of Own"),
        ({"lora_targets": "to_q"}, "lora_targets: expected a tuple of the ends of modules' names"),
        ({"lora_targets": ("",)}, "lora_targets: expected a tuple"),
        ({"adds_sound": None}, "adds_sound: expected True or False of Own, got None"),
        ({"adds_sound": True, "decode": None}, r"adds_sound: expected False, or a method decode"),
        ({"timelines": (Timeline(12, 6.0), Timeline(48, 25.0))},
         r"expected 2 s of audio, as clip_format has it, got 48 frames at 25 a second, 1\.920 s"),
        ({"timelines": (Timeline(13, 6.0), Timeline(50, 25.0)),
          "clip_format": ClipFormat(2.5, 12, 32, 32, 8000, 1)}, r"expected 2\.5 s of video"),
    ],
)  # fmt: skip
def test_a_member_of_another_type_is_named(own, members, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_members(lacking(own, **members))


def test_a_causal_codec_and_a_cut_tail_are_in_step(own):
    form = replace(own.clip_format, seconds=121 / 24)
    lines = Timeline(16, 3.0, first=1, stride=8), Timeline(126, 25.0, first=1, stride=4)
    check_members(lacking(own, clip_format=form, timelines=lines))


def test_a_transformer_that_is_loaded_when_first_asked_for_is_left_alone(own):
    def load(model):
        raise AssertionError("asked for")

    members = {"transformer": property(load), "__init__": lambda model: None}
    check_members(lacking(own, **members))
    hidden = type("Delegating", (), {"__getattr__": lambda model, name: getattr(own(), name)})
    check_members(hidden())


# --- where a name is told of ----------------------------------------------------------------------


def test_it_is_no_repository_and_its_folder_is_nobody_s_business(tmp_path):
    name = write_model(tmp_path)
    assert not on_hub("folder/my_model.py:Own")
    assert shareable(TrainConfig(model=name)).model == "own_model.py:Own"
