"""`check_model`: nothing to find in models that do as they should, else every fault by its name."""

import pytest
import torch
from documented_model import own_class
from micro import micro_model
from tiny_ltx2 import save_tiny_ltx2
from torch import nn

from syncdpo.data.clips import Clip
from syncdpo.models import check_model, load_model
from syncdpo.models.contract import quiet_clip
from syncdpo.models.quantised import bytes_held


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_class(tmp_path_factory.mktemp("own"))


def findings(model, **options):
    return {f.member.strip(): f for f in check_model(model, **options)}


def failed(model, **options):
    """{member: sentence} of what fails."""
    found = findings(model, **options).items()
    return {member: f.sentence for member, f in found if f.passed is False}


# --- models that do as they should ----------------------------------------------------------------


def test_the_page_s_own_model_passes_and_is_left_as_it_was(own):
    model = own()
    before = {name: x.clone() for name, x in model.transformer.state_dict().items()}
    trained = [p.requires_grad_(i % 2 == 0) for i, p in enumerate(model.transformer.parameters())]
    asked, size = [p.requires_grad for p in trained], bytes_held(model.transformer)
    found = findings(model)
    assert {member for member, f in found.items() if f.passed is None} == {"velocity_sign"}
    assert "these weights do not show" in found["velocity_sign"].sentence
    assert not [f for f in found.values() if f.passed is False]
    after = model.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert [p.requires_grad for p in model.transformer.parameters()] == asked
    assert bytes_held(model.transformer) == size


def test_the_embedded_model_s_trained_weights_show_the_sign():
    found = findings(load_model("tiny"))
    assert all(f.passed for f in found.values()), [str(f) for f in found.values()]
    assert "correlation with ε − x is +0." in found["velocity_sign"].sentence


def test_ltx2_passes_and_without_a_caption_generates_nothing(tmp_path):
    save_tiny_ltx2(tmp_path)
    model = load_model(str(tmp_path), frames=17, height=64, width=64)
    # Its small vocoder makes less sound than there should be; all else is LTX-2's own.
    found = findings(model, caption="a ball", generates=False)
    assert not [str(f) for f in found.values() if f.passed is False]
    generating = findings(model)["generate"]
    assert generating.passed is None
    assert "check_generation says: caption: expected text" in generating.sentence


def test_clips_need_not_be_made(own):
    assert "generate" not in findings(own(), generates=False)


# --- faults ---------------------------------------------------------------------------------------


def with_members(own, **members):
    return type("Own", (own,), members)()


def turned(own, change):
    """Another `encode`: a change of the latents of the right one."""
    return {"encode": lambda model, clip, caption: change(own.encode(model, clip, caption))}


def of_audio(change):
    return lambda latents: latents | {"audio": change(latents["audio"])}


def test_a_member_that_is_missing_ends_it(own):
    with pytest.raises(ValueError, match="velocity_sign: expected"):
        check_model(with_members(own, velocity_sign=2))


def test_the_transformer_is_a_module_and_one(own):
    function = with_members(own, __init__=lambda model: setattr(model, "transformer", len))
    assert "expected a torch.nn.Module, got builtin" in failed(function)["transformer"]
    two = property(lambda model: own().transformer, lambda model, value: None)
    assert (
        "the same one every time, got two"
        in failed(with_members(own, transformer=two))["transformer"]
    )
    empty = with_members(own, __init__=lambda m: setattr(m, "transformer", nn.Identity()))
    assert "expected weights in Identity, got none" in failed(empty)["transformer"]


@pytest.mark.parametrize(
    ("identity", "sentence"),
    [
        (lambda model: [1], "expected a dict, got list"),
        (lambda model: {}, "got nothing: every cache would do"),
        (lambda model: {"weights": torch.zeros(2)}, "expected values that JSON has"),
        (lambda model: {"at": id(object()), "draw": torch.rand(()).item()}, "the same every time"),
    ],
)
def test_the_identity_tells_caches_apart(own, identity, sentence):
    assert sentence in failed(with_members(own, identity=identity), generates=False)["identity"]


def test_a_model_of_several_formats_has_them_in_its_identity(own):
    members = {"set_format": lambda model, *size: None, "identity": lambda model: {"codec": 1}}
    sentence = failed(with_members(own, **members), generates=False)["identity"]
    assert sentence.startswith("expected clip_format in it, got no channels, fps, height")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: {"video": x["video"]}, "expected 'audio', got video"),
        (of_audio(lambda a: a.round().long()), "expected floats as audio, got torch.int64"),
        (of_audio(lambda a: a[:49]), "audio of 50 (50 frames of 1 tokens, says timelines[1]) on"),
        (of_audio(lambda a: a[None]), "for one clip has no batch axis, got [1, 50, 8]"),
        (of_audio(lambda a: a * torch.nan), "expected finite numbers in audio"),
        (of_audio(lambda a: a + torch.randn(50, 8)), "the same audio of the same clip (of a VAE's"),
    ],
)
def test_latents_fit_the_timelines(own, change, sentence):
    assert sentence in failed(with_members(own, **turned(own, change)))["encode"]


@pytest.mark.parametrize(
    ("stream", "frames", "sentence"),
    [
        ("audio", 2, "in the audio at its own time, got it 80 ms too late"),
        ("audio", -1, "got it 40 ms too early"),
        ("video", 1, "in the video at its own time, got it 167 ms too late"),
    ],
)
def test_latents_out_of_step_are_heard(own, stream, frames, sentence):
    """By one frame of a stream already, either way."""
    change = turned(own, lambda x: x | {stream: x[stream].roll(frames, 0)})
    assert sentence in failed(with_members(own, **change))["timelines"]


def test_an_impulse_that_changes_nothing_is_a_fault(own):
    silent = turned(own, of_audio(torch.zeros_like))
    assert (
        "expected an impulse to change the audio"
        in failed(with_members(own, **silent))["timelines"]
    )


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        (lambda n, g: (torch.rand(n, generator=g),), "picture and sound, got 1 tensors"),
        (lambda n, g: (torch.rand(n, generator=g).double(),) * 2, "got torch.float64 [64] on cpu"),
        (lambda n, g: (torch.rand(n, 1, generator=g),) * 2, "got torch.float32 [64, 1] on cpu"),
        (lambda n, g: (torch.rand(n, generator=g) * 1000 + 1,) * 2, "expected 0 < σ ≤ 1, got"),
        (lambda n, g: (torch.zeros(n),) * 2, "expected 0 < σ ≤ 1, got 0 to 0"),
        (lambda n, g: (torch.rand(n) * 0.9 + 0.1,) * 2, "a function of the generator"),
    ],
)
def test_noise_levels_are_of_the_generator(own, levels, sentence):
    draw = {"draw_sigma": lambda model, batch, generator: levels(batch, generator)}
    assert sentence in failed(with_members(own, **draw))["draw_sigma"]


def velocities(own, change):
    """Another `velocity`: of (model, transformer, noisy, sigma)."""
    return {"velocity": lambda model, t, noisy, sigma, conditions: change(model, t, noisy, sigma)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m, t, x, s: m.transformer(*x, s), "a call of the transformer that it is given"),
        (lambda m, t, x, s: [v[:, 1:] for v in t(*x, s)], "expected video of [2, 12, 48], got [2"),
        (lambda m, t, x, s: [v / 0 for v in t(*x, s)], "expected finite numbers in video"),
        (lambda m, t, x, s: [v.detach() for v in t(*x, s)], "raises RuntimeError"),
        (lambda m, t, x, s: [v.detach() + v.new_ones(1, requires_grad=True) for v in t(*x, s)],
         "expected a gradient in the transformer's weights"),
    ],
)  # fmt: skip
def test_the_velocity_is_of_the_transformer_that_is_given(own, change, sentence):
    assert sentence in failed(with_members(own, **velocities(own, change)))["velocity"]


def test_weights_that_have_no_part_are_counted(own):
    model = own()
    model.transformer.idle = nn.Linear(2, 2)
    sentence = findings(model)["velocity"].sentence
    assert sentence.endswith("of 19 weights 2 without a part in it, which DDP refuses")


@pytest.mark.parametrize(
    "change",
    [
        lambda m, t, x, s: [v - v.mean(0) for v in t(*x, s)],
        lambda m, t, x, s: t(*x, [level[:1].expand_as(level) for level in s]),
    ],
    ids=["a norm over the batch", "the first row's noise level for all"],
)
def test_rows_do_not_know_of_each_other(own, change):
    sentence = failed(with_members(own, **velocities(own, change)))["each row"]
    assert sentence.startswith("expected row")
    assert "whatever rows and noise levels are beside it" in sentence


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_weights_that_know_the_clip_is_told(own, sign):
    """The velocity of x itself: (x_σ − x) / σ is ε − x."""

    def known(model, transformer, noisy, sigma):
        clean = own.encode(model, quiet_clip(model), "").values()
        return [
            sign * (x - y) / s[:, None, None] + 0 * v
            for x, y, s, v in zip(noisy, clean, sigma, transformer(*noisy, sigma), strict=True)
        ]

    right = with_members(own, **velocities(own, known), velocity_sign=sign)
    assert findings(right)["velocity_sign"].sentence.startswith(f"{sign:+d}: the velocity's")
    wrong = with_members(own, **velocities(own, known), velocity_sign=-sign)
    assert failed(wrong)["velocity_sign"].startswith(f"expected {sign:+d}, for the velocity's")


def test_of_audio_splits(own):
    every = with_members(own, of_audio=lambda model, name: True)
    assert "got True of all" in failed(every)["of_audio"]
    none = findings(with_members(own, of_audio=lambda model, name: False))["of_audio"]
    assert none.passed is None
    assert "`trained: audio` would train nothing" in none.sentence


def test_a_lora_reaches_linear_layers(own):
    model = with_members(own, lora_targets=("to_x",))
    assert "ends of modules' names, got to_x, which none has" in failed(model)["lora_targets"]
    model = with_members(own, lora_targets=("norm",))
    model.transformer.norm = nn.LayerNorm(2)
    assert "got norm, which is LayerNorm" in failed(model)["lora_targets"]


def test_a_lora_beside_the_path_is_noticed(own):
    """Where a layer's weight is read and the layer not called, an adapter around it is idle."""

    class Reading(type(own().transformer)):
        def forward(self, video, audio, sigma):
            x = self.audio_in(audio)
            x = x + x @ self.to_q.weight.mT
            return self.video_out(self.video_in(video)), self.audio_out(x)

    model = with_members(own, lora_targets=("to_q",))
    model.transformer = Reading()
    assert "layers must be called, not their weights read" in failed(model)["lora_targets"]


@pytest.mark.parametrize(
    ("members", "member", "sentence"),
    [
        ({"save_weights": lambda m, folder, state, **o: None}, "save_weights",
         "expected a .safetensors file in the folder"),
        ({"save_weights": lambda m, folder, state: None}, "save_weights", "raises TypeError"),
        ({"load_weights": lambda m, path, **o: ""}, "save_weights",
         "expected load_weights to bring back"),
        ({"load_weights": lambda m, path, **o: ""}, "a LoRA", "a LoRA of 3 layers, got one of 0"),
        ({"load_weights": lambda m, path, **o: None}, "a LoRA", "to return text, or '', got None"),
    ],
)  # fmt: skip
def test_weights_that_do_not_come_back(own, members, member, sentence):
    assert sentence in failed(with_members(own, **members), generates=False)[member]


def test_large_models_are_not_written_out(own, monkeypatch):
    monkeypatch.setattr("syncdpo.models.contract.LARGEST", 100)
    assert "are not written out for a test" in findings(own())["save_weights"].sentence


def clips(change):
    """Another `generate`: a change of each clip and its number in the call."""

    def generate(model, captions, seeds, *, steps=None):
        for number, clip in enumerate(super(type(model), model).generate(captions, seeds)):
            yield change(clip, number)

    return {"generate": generate}


def brighter(clip, by):
    video = (clip.video.int() + by).clamp(0, 255).to(torch.uint8)
    return Clip(video, clip.fps, clip.audio, clip.sample_rate)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (clips(lambda clip, number: clip.video), "expected a Clip, got Tensor"),
        (clips(lambda clip, number: Clip(clip.video[1:], 12, clip.audio, 8000)),
         "expected pictures of [24, 32, 32, 3], as clip_format has it, got [23"),
        (clips(lambda clip, number: Clip(clip.video, 12, clip.audio, 4000)),
         "expected 2 s of sound, as clip_format has it, got 4.00"),
        (clips(lambda clip, number: brighter(clip, 50 * number)), "a function of its own seed"),
        ({"generate": lambda model, captions, seeds, steps: iter(())}, "got 0"),
    ],
)  # fmt: skip
def test_clips_are_of_the_format_and_of_their_seeds(own, members, sentence):
    assert sentence in failed(with_members(own, **members))["generate"]


def test_what_raises_is_a_finding_and_the_others_go_on(own):
    def broken(model, *given):
        raise KeyError("text_encoder")

    found = failed(with_members(own, draw_sigma=broken))
    assert found["draw_sigma"] == "raises KeyError: 'text_encoder'"
    assert "encode" not in found
    assert str(findings(micro_model(), generates=False)["encode"]).startswith("ok     encode  ")
