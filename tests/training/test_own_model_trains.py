"""A plain nn.Module behind the protocol trains as LTX-2 does, or one sentence says why not."""

import functools
from types import SimpleNamespace

import pytest
import torch
from documented_model import own_class, random_latents, write_model
from launching import assert_same, launch
from micro import outcome
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from syncdpo.models import load_model
from syncdpo.models.weights import FULL, LORA
from syncdpo.train import train
from syncdpo.training.checkpoint import read_figures
from syncdpo.training.config import TrainConfig
from syncdpo.training.memory import describe_needs, out_of_memory
from syncdpo.training.publish import CARD, upload

STEPS = 20
# The softmax does not see it: its gradient is rounding alone, which Adam makes a step of.
UNSEEN = r"to_k\.bias$"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_class(tmp_path_factory.mktemp("own"))


def run(folder, model, clips=10, **settings):
    """A short run; → (its log, its weights)."""
    defaults = {"steps": STEPS, "batch_size": 4, "warmup": 2, "learning_rate": 1e-3}
    config = TrainConfig(output=str(folder), model="own_model:Own", **defaults | settings)
    train(config, model, random_latents(clips), progress=False)
    return outcome(folder)


def fresh(own):
    torch.manual_seed(0)
    return own()


def losses(log):
    return torch.tensor([entry["loss"] for entry in log])


def changed(before, after):
    """The names of the weights that a run changed."""
    return {name for name, x in after.items() if not torch.equal(x, before[name])}


# --- all settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "syncdpo"])
@pytest.mark.parametrize("trained", ["both", "audio"])
def test_all_weights_or_the_sound_s_alone(own, tmp_path, method, trained):
    model = fresh(own)
    before = {name: x.clone() for name, x in model.transformer.state_dict().items()}
    log, weights = run(tmp_path, model, method=method, trained=trained, beta_video=1.0)
    assert losses(log).isfinite().all()
    wanted = {n for n in before if trained == "both" or model.of_audio(n)}
    assert changed(before, weights) == wanted


def test_it_learns(own, tmp_path):
    log, _ = run(tmp_path, fresh(own), method="sft", learning_rate=1e-2, steps=60)
    assert losses(log)[-10:].mean() < 0.8 * losses(log)[:10].mean()


@pytest.mark.parametrize("settings", [{}, {"cache_reference": 2}, {"lora_rank": 4}])
def test_a_pair_in_halves_is_the_pair_as_a_whole(own, tmp_path, settings):
    whole = run(tmp_path / "whole", fresh(own), **settings)
    halves = run(tmp_path / "halves", fresh(own), split_pair=True, **settings)
    assert_same(whole, halves, ignore=UNSEEN)


def test_cached_reference_errors_are_those_of_the_reference(own, tmp_path):
    for name, settings in (("drawn", {"draws": 2}), ("cached", {"cache_reference": 2})):
        run(tmp_path / name, fresh(own), **settings)
    assert_same(outcome(tmp_path / "drawn"), outcome(tmp_path / "cached"), ignore=UNSEEN)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"lora_rank": 2, "cache_reference": 2}])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(own, tmp_path, settings):
    straight = run(tmp_path / "straight", fresh(own), **settings)
    stopped = tmp_path / "stopped"
    run(stopped, fresh(own), checkpoint_every=7, **settings)
    max(stopped.glob("checkpoint-*")).unlink()
    (resumed, weights) = run(stopped, fresh(own), checkpoint_every=7, resume=True, **settings)
    assert torch.equal(losses(resumed), losses(straight[0]))
    assert all(torch.equal(x, weights[name]) for name, x in straight[1].items())


def test_held_out_figures_the_best_step_and_samples(own, tmp_path):
    log, _ = run(
        tmp_path, fresh(own), clips=20, validation=0.3, validate_every=5, keep="best",
        sample_every=10, sample_count=1, sample_steps=2, checkpoint_every=5,
    )  # fmt: skip
    assert [step for step, _ in read_figures(tmp_path, "validation")] == [0, 5, 10, 15, 20]
    assert [step for step, _ in read_figures(tmp_path, "samples")] == [0, 10, 20]
    alone, _ = run(tmp_path / "alone", fresh(own), clips=20, validation=0.3, validate_every=5)
    assert torch.equal(losses(log), losses(alone))


def test_two_processes_equal_one_and_both_find_the_model(tmp_path):
    """By the command line, weights drawn at random in each of them."""
    from typer.testing import CliRunner

    from syncdpo.cli import app
    from syncdpo.data.clips import write_clip
    from syncdpo.data.synthetic import render_clip

    name = write_model(tmp_path)
    (tmp_path / "clips").mkdir()
    for seed in range(4):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", render_clip(seed))
    cache = ("--model", name, "--output", tmp_path / "cache")
    invoke = functools.partial(CliRunner().invoke, app)
    assert not invoke(list(map(str, ("prepare", tmp_path / "clips", *cache)))).exit_code
    settings = ("train", "--model", name, "--data", tmp_path / "cache", "--steps", STEPS)
    one = (*settings, "--output", tmp_path / "one", "--batch-size", 2)
    assert not invoke(list(map(str, one))).exit_code
    two = (*settings, "--output", tmp_path / "two", "--batch-size", 1)
    launch("ddp_8_gpus.yaml", "-m", "syncdpo", *two)
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"), ignore=UNSEEN)


# --- LoRA -----------------------------------------------------------------------------------------


def test_a_lora_is_called_as_the_model_s_own_modules_and_does_what_it_did(own, tmp_path):
    model = fresh(own)
    before = {name: x.clone() for name, x in model.transformer.state_dict().items()}
    _, weights = run(tmp_path, model, lora_rank=2)
    assert set(weights) == {
        f"diffusion_model.to_{x}.lora_{half}.weight" for x in "qkv" for half in "AB"
    }
    inputs = torch.randn(2, 12, 48), torch.randn(2, 50, 8), (torch.rand(2), torch.rand(2))
    loaded = fresh(own)
    untouched = loaded.transformer(*inputs)
    loaded.load_weights(tmp_path)
    for trained, found, base in zip(
        model.transformer.eval()(*inputs), loaded.transformer(*inputs), untouched, strict=True
    ):
        torch.testing.assert_close(found, trained)
        assert not torch.allclose(found, base)
    kept = {n.replace(".base_layer", ""): x for n, x in model.transformer.state_dict().items()}
    assert all(torch.equal(x, kept[name]) for name, x in before.items())


def test_a_module_that_is_called_as_one_of_ltx_2_s_keeps_its_name(own, tmp_path):
    """LTX-2's `proj_in` is `patchify_proj` to other tools. This one is not, and is never called."""
    model = fresh(own)
    model.transformer.proj_in = nn.Linear(2, 2)
    model.lora_targets = ("proj_in", "to_q")
    _, weights = run(tmp_path, model, lora_rank=2, steps=2)
    assert {name.split(".")[1] for name in weights} == {"proj_in", "to_q"}


@pytest.mark.parametrize("reference", ["weights", "base"])
def test_a_lora_is_trained_on_against_what_it_was_or_against_the_base(own, tmp_path, reference):
    run(tmp_path / "first", fresh(own), lora_rank=2, beta_audio=100.0)
    onward = {"weights": str(tmp_path / "first"), "lora_rank": 3, "reference": reference}
    log, weights = run(tmp_path / "onward", fresh(own), **onward)
    assert (log[0]["margin"] == 0) == (reference == "weights")
    assert len(weights["diffusion_model.to_q.lora_A.weight"]) == 3


def test_a_lora_is_merged_where_all_weights_are_trained(own, tmp_path):
    run(tmp_path / "lora", fresh(own), lora_rank=2)
    model = fresh(own)
    before = {name: x.clone() for name, x in model.transformer.state_dict().items()}
    merged = {"weights": str(tmp_path / "lora"), "learning_rate": 1e-12, "weight_decay": 0.0}
    _, weights = run(tmp_path / "merged", model, **merged)
    pair = load_file(tmp_path / "lora" / LORA)
    for name in ("to_q", "to_k", "to_v"):
        a, b = (pair[f"diffusion_model.{name}.lora_{half}.weight"] for half in "AB")
        expected = before[f"{name}.weight"] + b @ a
        torch.testing.assert_close(weights[f"{name}.weight"], expected)


# --- what a plain module has not ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing: expected false, or a "
         r"transformer with a method enable_gradient_checkpointing\(\), which Transformer has not"),
        ({"lora_rank": 2, "trained": "audio"}, "lora_targets: expected ends of names of modules in "
         "Transformer that are to be trained, got to_q, to_k, to_v, which none has"),
    ],
)  # fmt: skip
def test_what_it_has_not_is_one_sentence(own, tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, fresh(own), **settings)


def test_weights_of_two_names_are_trained_by_a_lora_alone(own, tmp_path):
    model = fresh(own)
    model.transformer.to_k.weight = model.transformer.to_q.weight
    sentence = r"expected a LoRA of Transformer, whose to_k\.weight is its to_q\.weight too"
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path / "all", model)
    run(tmp_path / "lora", model, lora_rank=2, steps=1)


def test_buffers_of_any_kind_are_kept(own, tmp_path):
    model = fresh(own)
    model.transformer.register_buffer("table", torch.arange(4))
    model.transformer.register_buffer("nothing", torch.zeros(0))
    _, weights = run(tmp_path, model, steps=1)
    assert weights["table"].tolist() == [0, 1, 2, 3]
    assert weights["nothing"].shape == (0,)


def test_what_is_no_linear_layer_gets_no_lora(own, tmp_path):
    model = fresh(own)
    model.lora_targets = ("norm",)
    model.transformer.norm = nn.LayerNorm(2)
    with pytest.raises(ValueError, match="lora_targets: expected linear layers, got norm of Trans"):
        run(tmp_path, model, lora_rank=2)


def test_blocks_are_offloaded_where_there_are_any(own, tmp_path):
    model = fresh(own)
    model.transformer.enable_gradient_checkpointing = lambda: None
    settings = {"lora_rank": 2, "offload": "blocks", "gradient_checkpointing": True}
    with pytest.raises(ValueError, match=r"offload: expected .*_blocks, got Transformer"):
        run(tmp_path, model, **settings)


def test_its_own_gradient_checkpointing_is_asked_for(own, tmp_path):
    model, asked = fresh(own), []
    model.transformer.enable_gradient_checkpointing = lambda: asked.append(True)
    run(tmp_path, model, gradient_checkpointing=True, steps=1)
    assert asked == [True]


def test_settings_of_a_transformer_may_be_of_any_kind(own, tmp_path):
    for rank, file in ((0, FULL), (2, LORA)):
        model = fresh(own)
        model.transformer.config = SimpleNamespace(width=64)
        run(tmp_path / str(rank), model, lora_rank=rank, steps=1)
        with safe_open(tmp_path / str(rank) / file, "pt") as opened:
            assert "base_version" not in opened.metadata()
        fresh(own).load_weights(tmp_path / str(rank))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [({}, "gradient_checkpointing: true"), ({"lora_rank": 2}, "base_precision: nf4")],
)
def test_its_memory_is_not_known(tmp_path, settings, advice):
    config = TrainConfig(model=write_model(tmp_path), **settings)
    with pytest.raises(
        ValueError, match=r"estimate: expected tiny, LTX-2 or Kandinsky 6, whose .*:Own"
    ):
        describe_needs(config)
    sentence = out_of_memory(config)
    assert sentence.startswith("the GPU ran out of memory; how much ")
    assert advice in sentence


def test_latents_of_another_trainer_are_ltx_2_s(own, tmp_path):
    from syncdpo.data import open_latents

    (tmp_path / ".precomputed" / "latents").mkdir(parents=True)
    torch.save({}, tmp_path / ".precomputed" / "latents" / "0.pt")
    several = type("Own", (own,), {"set_format": lambda model, *size: None})()
    for model in (fresh(own), several):
        with pytest.raises(ValueError, match="expected an LTX-2 pipeline as model, got Own"):
            open_latents(tmp_path, model)


# --- what is said of its weights ------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "what"), [(0, "All weights of"), (2, "A LoRA for")])
def test_the_card_says_whose_model_it_is(own, tmp_path, rank, what):
    run(tmp_path, fresh(own), lora_rank=rank, steps=1)
    card = (tmp_path / CARD).read_text()
    assert f"{what} the model `own_model:Own`, from SyncDPO" in card
    assert "syncdpo sample --model own_model:Own --weights" in card
    assert "The model's own code comes first" in card
    assert "LTX-2 of version" not in card
    assert "library_name" not in card


def test_a_model_with_ltx_2_s_transformer_is_not_called_ltx_2(own, tmp_path):
    model = fresh(own)
    model.transformer.config = {"cross_attn_mod": True}  # as diffusers' has it
    run(tmp_path, model, lora_rank=2, steps=1)
    assert "LTX-2 of version" not in (tmp_path / CARD).read_text()


def test_weights_by_names_of_its_own_go_to_the_hub_too(own, tmp_path, monkeypatch):
    sent = {}

    class Hub:
        def create_repo(self, repository, **options):
            pass

        def upload_folder(self, **options):
            sent.update(options)

    monkeypatch.setattr("syncdpo.training.publish.HfApi", Hub)
    for name in ("own.safetensors", "checkpoint-000001.safetensors", CARD, "log.jsonl"):
        (tmp_path / name).write_text("")
    upload(tmp_path, "me/own")
    assert sorted(sent["allow_patterns"]) == [CARD, "own.safetensors"]


def test_it_is_loaded_by_the_name_that_the_settings_have(tmp_path):
    name = write_model(tmp_path)
    config = TrainConfig(output=str(tmp_path / "run"), model=name, steps=2, batch_size=2)
    train(config, data=random_latents(), progress=False)
    _, weights = outcome(tmp_path / "run")
    assert weights.keys() == load_model(name).transformer.state_dict().keys()
