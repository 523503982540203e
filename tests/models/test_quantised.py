"""A frozen base in fewer bits: bytes, errors, what is left alone, and what is refused."""

import sys
import weakref

import pytest
import torch
from diffusers import LTX2Pipeline
from micro import micro_model, random_latents
from tiny_ltx2 import save_tiny_ltx2
from torch import nn
from torch.utils.data import default_collate
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.clips import write_clip
from syncdpo.data.latents import LatentDataset
from syncdpo.data.synthetic import render_clip
from syncdpo.models import load_model, quantised
from syncdpo.models.ltx2 import LTX2
from syncdpo.models.quantised import bytes_held, dequantised, quantisable, quantise, stored_bytes
from syncdpo.training.checkpoint import read_log
from syncdpo.training.config import TrainConfig
from syncdpo.training.memory import size_of

# ‖w' − w‖ / ‖w‖ of normally distributed weights: half a step of 8 bits, of 3 bits of mantissa,
# and of sixteen values per block of 64.
ROUNDING = {"int8": 0.012, "fp8": 0.030, "nf4": 0.100}


@pytest.fixture(params=["fp8", "int8", "nf4"])
def precision(request):
    pytest.importorskip(quantised.LIBRARIES[request.param])
    return request.param


def velocity(model):
    latents = default_collate(random_latents(2))
    sigma = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        both = model.velocity(
            model.transformer, (latents["video"], latents["audio"]), (sigma, sigma), {}
        )
    return torch.cat([stream.flatten() for stream in both])


def wide_model(**config):
    """Layers as wide as blocks of scales, of which the micro model's rows are halves."""
    heads = {"attention_head_dim": 64, "cross_attention_dim": 128}
    return micro_model(**heads | {f"audio_{name}": size for name, size in heads.items()} | config)


def test_velocities_are_those_of_the_rounded_weights(precision):
    """The quantised layers compute with nothing but the weights that they stand for."""
    exact, rounded, model = micro_model(), micro_model(), micro_model()
    names = list(quantisable(model.transformer))
    quantise(model.transformer, precision)
    for name in names:
        before = exact.transformer.get_submodule(name).weight.detach()
        after = dequantised(model.transformer.get_submodule(name)).float()
        assert (after - before).norm() <= ROUNDING[precision] * 1.5 * before.norm(), name
        rounded.transformer.get_submodule(name).weight.data = after
    found, expected, unrounded = velocity(model), velocity(rounded), velocity(exact)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    # As weights change, so does what they make; and the rounding is there at all.
    difference = (found - unrounded).norm() / unrounded.norm()
    assert 1e-4 < difference <= 2 * ROUNDING[precision]


def test_rounding_of_normal_weights(precision):
    layer = nn.Linear(1024, 256)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    module, before = nn.ModuleList([layer]), layer.weight.detach().clone()
    quantise(module, precision)
    error = (dequantised(module[0]).float() - before).norm() / before.norm()
    assert ROUNDING[precision] / 2 < error < ROUNDING[precision]


def test_the_base_has_the_bytes_computed(precision):
    model = wide_model(num_layers=2)
    computed = size_of(TrainConfig(lora_rank=2, base_precision=precision), model).base
    whole = bytes_held(model.transformer)
    quantise(model.transformer, precision)
    assert bytes_held(model.transformer) == pytest.approx(computed, rel=0.05)
    assert bytes_held(model.transformer) < 0.6 * whole


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (33, 70)])
def test_bytes_of_one_layer(precision, shape):
    module = nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False)])
    quantise(module, precision)
    assert bytes_held(module) == stored_bytes(shape, precision)


def test_what_is_sensitive_keeps_its_bits(precision):
    gates = {"gated_attn": True, "audio_gated_attn": True}
    before, model = micro_model(**gates), micro_model(**gates)
    model.transformer._keep_in_fp32_modules = ["audio_ff"]  # as a class may say of itself
    quantise(model.transformer, precision)
    changed = {
        name
        for name, layer in model.transformer.named_modules()
        if isinstance(layer, nn.Linear)
        and not torch.equal(
            dequantised(layer).float(), before.transformer.get_submodule(name).weight
        )
    }
    assert {name.split(".")[2] for name in changed} == {
        "attn1", "attn2", "ff", "audio_attn1", "audio_attn2", "audio_to_video_attn",
        "video_to_audio_attn",
    }  # fmt: skip
    assert all(name.startswith("transformer_blocks.") for name in changed)
    assert not any("gate" in name or "norm" in name for name in changed)
    others = dict(model.transformer.named_parameters())
    for name, parameter in before.transformer.named_parameters():
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(others[name], parameter), name


def test_one_full_layer_at_a_time(precision, monkeypatch):
    """When a layer is quantised, the full weights of those before it are gone."""
    model, seen = micro_model(), []
    convert = quantised._quantised

    def watched(layer, wanted):
        assert not [weight for weight in seen if weight() is not None]
        seen.append(weakref.ref(layer.weight))
        return convert(layer, wanted)

    monkeypatch.setattr(quantised, "check_runs", lambda *_, **__: None)
    monkeypatch.setattr(quantised, "_quantised", watched)
    count = len(quantisable(model.transformer))
    quantise(model.transformer, precision)
    assert len(seen) == count


@pytest.mark.parametrize(("wanted", "library"), list(quantised.LIBRARIES.items()))
def test_a_missing_library_is_named(monkeypatch, wanted, library):
    for name in [n for n in sys.modules if n.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"base_precision: {wanted} needs {library}.*\[quant\]"):
        quantise(micro_model().transformer, wanted)


def test_a_device_that_cannot_is_named(precision, monkeypatch):
    def refuses(*_):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(quantised, "_quantised", refuses)
    with pytest.raises(ValueError, match=rf"{precision} by \w+ does not run on cpu \(no kernel "):
        quantise(micro_model().transformer, precision)


def test_a_model_without_whole_linear_layers_is_refused(precision):
    model = micro_model()
    quantise(model.transformer, precision)
    with pytest.raises(ValueError, match="expected linear layers with whole weights"):
        quantise(model.transformer, precision)


# --- the text encoder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx2")
    (folder / "clips").mkdir()
    write_clip(folder / "clips" / "0.mp4", render_clip(0))
    (folder / "clips" / "0.txt").write_text("a ball strikes the floor")
    save_tiny_ltx2(folder / "model")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(word) for word in arguments])


def test_prepare_with_a_quantised_text_encoder(pipeline, precision):
    """Its cache trains as any other does, and is not mixed with one of another precision."""
    cache = pipeline / precision
    arguments = (
        "prepare", pipeline / "clips", "--output", cache, "--model", pipeline / "model",
        "--frames", 17, "--height", 64, "--width", 64,
    )  # fmt: skip
    option = ("--text-encoder-precision", precision)
    assert invoke(*arguments, *option).exit_code == 0
    assert LatentDataset(cache).identity["text_encoder_precision"] == precision
    mixed = invoke(*arguments)
    assert isinstance(mixed.exception, ValueError)
    assert f"text_encoder_precision is {precision} in the cache" in str(mixed.exception)
    trained = ("train", "--model", pipeline / "model", "--data", cache, "--lora-rank", 2)
    estimated = invoke(*trained, "--estimate", "--base-precision", precision)
    assert "12 and 18 tokens" in estimated.stdout  # of the cache's clips
    run = invoke(
        *trained, "--steps", 2, "--batch-size", 1, "--output", cache / "run",
        "--base-precision", precision, "--gradient-checkpointing", "--offload", "blocks",
        "--split-pair", "--learning-rate", 1e-2, "--warmup", 0,
    )  # fmt: skip
    assert run.exit_code == 0, run.exception
    assert read_log(cache / "run")[0]["margin"] == 0
    whole = LTX2Pipeline.from_pretrained(pipeline / "model")
    whole.load_lora_weights(cache / "run")
    assert whole.get_active_adapters()


def test_the_text_is_that_of_a_rounded_encoder(pipeline, precision):
    texts = []
    for wanted in ("bf16", precision):
        model = LTX2(pipeline / "model", text_encoder_precision=wanted)
        texts.append(torch.cat([x.flatten() for x in model.conditions(["a ball"]).values()]))
    assert 0 < (texts[1] - texts[0]).norm() / texts[0].norm() < 2 * ROUNDING[precision]


def test_an_unknown_precision_of_the_text_encoder_is_refused(pipeline):
    with pytest.raises(ValueError, match="text_encoder_precision: expected bf16, fp8, int8, nf4"):
        load_model(str(pipeline / "model"), text_encoder_precision="int4")
    with pytest.raises(ValueError, match="text_encoder_precision: for LTX-2 and Kandinsky 6 alone"):
        load_model("tiny", text_encoder_precision="int8")
