"""What a run will need: formulas against counts, the document, and the command line."""

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from micro import micro_model, random_latents
from tiny_ltx2 import VERSIONS
from torch.utils.data import default_collate
from typer.testing import CliRunner

import syncdpo.train
from syncdpo.cli import app, main
from syncdpo.models.ltx2 import LTX2
from syncdpo.models.quantised import LIBRARIES, parts_of, quantise
from syncdpo.training.adapter import train_adapter
from syncdpo.training.config import TrainConfig, load_config
from syncdpo.training.memory import (
    GB,
    forward_flop,
    needed_bytes,
    out_of_memory,
    size_of,
    step_flop,
)

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs" / "ltx2_lora.yaml")
FIVE_SECONDS = (6144, 126)


@pytest.fixture(scope="module")
def full_size():
    """LTX-2.3 without its weights: what its configuration says."""
    parameters = inspect.signature(LTX2VideoTransformer3DModel.__init__).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty}
    return SimpleNamespace(
        config=settings | VERSIONS["2.3"]["transformer"],
        of_audio=LTX2.of_audio,
        lora_targets=LTX2.lora_targets,
        text_tokens=LTX2.text_tokens,
    )


def gigabytes(model, config, streams=FIVE_SECONDS):
    return sum(needed_bytes(config, size_of(config, model), *streams).values()) / GB


def tokens(pictures):
    return ((pictures - 1) // 8 + 1) * 16 * 24, round(pictures / 24 * 25)


def rows_of_the_document():
    """Of the table of docs/ltx2.md: precision, split_pair, offload, GB by clip length."""
    for line in (ROOT / "docs" / "ltx2.md").read_text().splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if cells[0] in ("bf16", "fp8", "int8", "nf4", "fp8, int8"):
            yield cells


def test_the_documents_table(full_size):
    rows = list(rows_of_the_document())
    assert len(rows) == 3 * 4
    for precision, split, offload, *found in rows:
        for name in precision.split(", "):
            config = replace(
                CONFIG, base_precision=name, split_pair=split == "yes", optimizer="adamw8bit",
                offload="blocks" if offload == "yes" else "none",
            )  # fmt: skip
            computed = [gigabytes(full_size, config, tokens(n)) for n in (49, 121, 241, 361, 481)]
            assert [f"{value:.0f}" for value in computed] == found


@pytest.mark.parametrize(("name", "memory"), [("24gb", 24), ("32gb", 32)])
def test_a_lora_on_clips_of_5_seconds_fits(full_size, name, memory):
    config = load_config(ROOT / "configs" / f"ltx2_lora_{name}.yaml")
    assert config.lora_rank == 32
    assert gigabytes(full_size, config) < memory


def test_the_full_size_is_the_documents(full_size):
    size = size_of(CONFIG, full_size)
    assert size.weights == pytest.approx(18.9e9, rel=0.01)
    assert size.trained == pytest.approx(214e6, rel=0.01)
    assert gigabytes(full_size, CONFIG) - 3 == pytest.approx(52, abs=0.5)  # 51.2 was measured
    assert forward_flop(size, *FIVE_SECONDS) == pytest.approx(199e12, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        ({"method": "sft"}, 3),
        ({}, 8),
        ({"cache_reference": 1}, 6),
        ({"split_pair": True}, 10),
        ({"gradient_checkpointing": False}, 6),
        ({"lora_rank": 0}, 10),
        ({"batch_size": 3}, 24),
    ],
)
def test_operations_of_a_step(full_size, settings, forwards):
    """As docs/ltx2.md counts them, in forwards of one clip."""
    config = replace(CONFIG, accumulation=1, **settings)
    size = size_of(config, full_size)
    expected = forwards * forward_flop(size, *FIVE_SECONDS)
    assert step_flop(config, size, *FIVE_SECONDS) == pytest.approx(expected)


def test_what_is_counted_of_a_model_is_what_it_has():
    """Blocks are alike: one of them, counted, stands for all."""
    for settings in ({"lora_rank": 3}, {"lora_rank": 3, "trained": "audio"}, {}):
        config, model = TrainConfig(**settings), micro_model(num_layers=3)
        size = size_of(config, model)
        assert size.weights == sum(p.numel() for p in model.transformer.parameters())
        policy, _ = syncdpo.train.policy_and_reference(config, model)
        assert size.trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_what_the_backward_holds_of_a_block(precision):
    """Full weights of all its layers in fp8 and int8; in nf4 none, which its backward makes."""
    pytest.importorskip(LIBRARIES[precision])
    model = micro_model()
    transformer = model.transformer
    quantise(transformer, precision)
    train_adapter(transformer, 2, model.lora_targets, lambda name: True, seed=0)
    own = {
        part.untyped_storage().data_ptr() for p in transformer.parameters() for part in parts_of(p)
    }
    held = {}

    def keep(tensor):
        plain = type(tensor) is torch.Tensor and tensor.ndim == 2 and not tensor.requires_grad
        if plain and tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    latents = default_collate(random_latents(2))
    streams, sigma = (latents["video"], latents["audio"]), torch.tensor([0.3, 0.7])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.velocity(transformer.train(), streams, (sigma, sigma), {})
    shapes = [x.weight.shape for x in micro_model().transformer.transformer_blocks.modules()
              if isinstance(x, torch.nn.Linear)]  # fmt: skip
    wanted = {tuple(shape) for shape in shapes} | {tuple(shape)[::-1] for shape in shapes}
    weights = [t for t in held.values() if tuple(t.shape) in wanted]
    computed = size_of(TrainConfig(lora_rank=2, base_precision=precision), model).whole_block
    if precision == "nf4":
        assert not weights
        assert computed == 0
    else:
        found = sum(t.numel() * t.element_size() for t in weights)
        # All but those of layers whose inputs need no gradient: the first ones of the block.
        assert 0.5 * computed < found <= computed


# --- the command line -----------------------------------------------------------------------------


def estimate(*arguments):
    path = ROOT / "configs" / "ltx2_lora.yaml"
    words = ["train", "--config", path, "--estimate", *arguments]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_the_estimate_names_its_parts(tmp_path):
    shown = estimate("--output", tmp_path / "run", "--offload", "blocks")
    for part in ("base", "trained weights", "gradients", "optimizer", "checkpoints", "one block",
                 "spare", "in all", "host memory", "TFLOP"):  # fmt: skip
        assert part in shown
    assert "TFLOP/s" not in shown
    assert not (tmp_path / "run").exists()
    numbers = [float(n) for n in re.findall(r"([\d.]+) GB(?! on| for)", shown)]
    total = float(re.search(r"in all +([\d.]+) GB", shown)[1])
    assert sum(numbers) == pytest.approx(total, abs=0.05)


def test_the_estimate_takes_a_rate():
    shown = estimate("--tflops", 1e-3, "--steps", 36)
    seconds = float(re.search(r"([\d.]+) s at 0.001 TFLOP/s", shown)[1])
    assert float(re.search(r"36 +steps +([\d.]+) h", shown)[1]) == pytest.approx(
        seconds / 100, abs=0.01
    )
    flop = float(re.search(r"a step +([\d.]+) TFLOP", shown)[1])
    assert seconds == pytest.approx(flop * 1000, abs=100)


@pytest.mark.parametrize("arguments", [("--tflops", "5"), ("--estimate", "--tflops", "0")])
def test_a_rate_without_use_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["syncdpo", "train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "tflops: expected" in capsys.readouterr().err


def test_without_memory_three_settings_are_named(full_size, monkeypatch, capsys, tmp_path):
    """One sentence, exit code 2, whatever the run was."""

    def runs_out(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(syncdpo.train, "train", runs_out)
    arguments = ("--output", str(tmp_path), "--lora-rank", "32", "--batch-size", "8")
    monkeypatch.setattr(sys, "argv", ["syncdpo", "train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert "ran out of memory: this run needs about" in said
    assert said.count("(saves") == 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ["offload: blocks", "base_precision: nf4", "split_pair: true"]),
        (
            {"split_pair": True, "base_precision": "nf4"},
            ["offload: blocks", "optimizer: adamw8bit"],
        ),
        ({"lora_rank": 0}, ["lora_rank: 32", "optimizer: adamw8bit", "split_pair: true"]),
        ({"batch_size": 4}, ["offload: blocks", "base_precision: nf4", "split_pair: true"]),
        (
            {"base_precision": "nf4", "split_pair": True, "offload": "blocks",
             "optimizer": "adamw8bit"},
            [],
        ),
    ],
)  # fmt: skip
def test_advice_is_what_saves_most(full_size, monkeypatch, settings, named):
    config = replace(CONFIG, **settings)
    model = SimpleNamespace(
        **vars(full_size),
        timelines=[SimpleNamespace(frames=count, tokens=1) for count in FIVE_SECONDS],
    )
    monkeypatch.setattr("syncdpo.training.memory.load_model", lambda *_, **__: model)
    said = out_of_memory(config)
    assert f"needs about {gigabytes(full_size, config):.1f} GB" in said
    found = re.findall(r"([a-z_0-9]+: \w+)(?:, accumulation: \d+)? \(saves ([\d.]+) GB\)", said)
    assert [name for name, _ in found] == named
    assert ("shorter or smaller clips" in said) == (not named)
    savings = [float(saved) for _, saved in found]
    assert savings == sorted(savings, reverse=True)
