"""What Kandinsky 6 needs: counts against the classes, the document, the settings, the card."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Kandinsky6Transformer3DModel
from huggingface_hub import ModelCard
from tiny_kandinsky6 import LITE, save_tiny_kandinsky6
from typer.testing import CliRunner

import syncdpo.train
from syncdpo.cli import app
from syncdpo.models.base_model import version_of
from syncdpo.models.kandinsky6 import Kandinsky6
from syncdpo.models.kandinsky6_parts import LAYOUT, prepared
from syncdpo.models.model_card import PUBLISHED, model_card
from syncdpo.models.weights import COMFYUI_LORA
from syncdpo.training.adapter import train_adapter
from syncdpo.training.config import TrainConfig, load_config
from syncdpo.training.memory import GB, forward_flop, needed_bytes, size_of, step_flop
from syncdpo.training.sizes import KANDINSKY6_SAVED

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs" / "kandinsky6_lite_lora.yaml")
RATE = 400e12  # operations a second that the document supposes
FIVE_SECONDS = (121, 512, 768)


@pytest.fixture(scope="module")
def lite():
    """Lite without its weights: what its configuration says."""
    return SimpleNamespace(
        config=LAYOUT.defaults("transformer") | LITE,
        of_audio=Kandinsky6.of_audio,
        lora_targets=Kandinsky6.lora_targets,
        text_tokens=Kandinsky6.text_tokens,
    )


def tokens(pictures, height, width):
    frames = (pictures - 1) // 4 + 1
    return frames * (height // 16) * (width // 16), math.ceil(pictures / 24 * 44100 / 1024)


def gigabytes(model, config, *clip):
    return sum(needed_bytes(config, size_of(config, model), *tokens(*clip)).values()) / GB


def test_the_documents_table(lite):
    rows = 0
    for line in (ROOT / "docs" / "kandinsky6.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "×" not in cells[0] or len(cells) != 9:
            continue
        rows += 1
        sides, pictures = cells[0].split(", ")[1].strip(")").split(" (")
        clip = (int(pictures), *map(int, sides.split("×")))
        settings = [
            replace(CONFIG, split_pair=False), CONFIG, replace(CONFIG, offload="blocks"),
        ]  # fmt: skip
        flop = forward_flop(size_of(CONFIG, lite), *tokens(*clip))
        assert cells[1:] == [
            f"{tokens(*clip)[0]:,}",
            f"{flop / 1e12:,.0f}",
            *(f"{gigabytes(lite, config, *clip):.0f}" for config in settings),
            *(f"{times * flop / RATE:.1f}" for times in (3, 8, 10)),
        ]
    assert rows == 7


def test_the_shipped_settings_fit_24_gb(lite):
    assert (CONFIG.lora_rank, CONFIG.sigma, CONFIG.base_precision) == (32, "shared", "bf16")
    assert gigabytes(lite, CONFIG, *FIVE_SECONDS) < 24
    size = size_of(CONFIG, lite)
    assert size.weights == pytest.approx(3.18e9, rel=0.01)
    assert size.trained == pytest.approx(66e6, rel=0.01)
    # A step of four pairs, each twice forward for the policy more than without split_pair.
    once = replace(CONFIG, accumulation=1)
    flop = forward_flop(size, *tokens(*FIVE_SECONDS))
    assert step_flop(once, size, *tokens(*FIVE_SECONDS)) == pytest.approx(10 * flop)
    for words in ("22 GB for clips of 5 s at", "13 GB for 2 s at 384×640", "7,000 TFLOP"):
        assert words in (ROOT / "configs" / "kandinsky6_lite_lora.yaml").read_text()


def test_other_figures_of_the_document(lite):
    text = " ".join((ROOT / "docs" / "kandinsky6.md").read_text().split())
    every = replace(
        CONFIG, lora_rank=0, optimizer="adamw8bit", cache_reference=1,
    )  # fmt: skip
    assert f"5 s at 512×768: {gigabytes(lite, every, *FIVE_SECONDS):.0f} GB. Pro:" in text
    pro = SimpleNamespace(**vars(lite))
    pro.config = lite.config | {
        "model_dim": 4096, "model_dim_a": 2048, "ff_dim": 16384, "ff_dim_a": 7168,
        "axes_dims": (32, 48, 48), "axes_dims_a": (32, 48, 48), "num_text_blocks": 4,
        "num_visual_blocks": 60, "time_dim": 1024, "time_dim_a": 1024,
    }  # fmt: skip
    small = replace(CONFIG, base_precision="nf4", optimizer="adamw8bit")
    needed = [
        gigabytes(pro, config, *FIVE_SECONDS)
        for config in (CONFIG, replace(CONFIG, offload="blocks"), small)
    ]
    words = "takes {:.0f} GB with `split_pair`, {:.0f} with `offload: blocks` beside it, and {:.0f}"
    assert words.format(*needed) in text
    hours = [10 * forward_flop(size_of(CONFIG, lite), *tokens(*clip)) * 2000 / 60e12 / 3600
             for clip in ((49, 384, 640), FIVE_SECONDS)]  # fmt: skip
    assert "take {:.0f} h, of 5 s at 512×768 {:.0f} h".format(*hours) in text


def test_what_is_counted_of_a_model_is_what_it_has(tmp_path):
    """Of each kind of block one is counted for all."""
    folder = save_tiny_kandinsky6(tmp_path, num_visual_blocks=3, num_text_blocks=2)
    for settings in ({"lora_rank": 3}, {"lora_rank": 3, "trained": "audio"}, {}):
        model = Kandinsky6(folder, frames=17, height=32, width=32)
        config = TrainConfig(**settings)
        size = size_of(config, model)
        assert size.weights == sum(p.numel() for p in model.transformer.parameters())
        policy, _ = syncdpo.train.policy_and_reference(config, model)
        assert size.trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_operations_are_those_of_the_matrices(lite):
    """Linear layers and attentions, counted one by one as they run on the meta device."""
    small = {
        "model_dim": 64, "model_dim_a": 32, "ff_dim": 192, "ff_dim_a": 80, "num_text_blocks": 1,
        "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "axes_dims_a": (4, 6, 6),
    }  # fmt: skip
    settings = lite.config | small
    with torch.device("meta"):
        transformer = Kandinsky6Transformer3DModel.from_config(settings)
    done = []

    def count(module, inputs, output):
        if "_transformer_blocks" in module.place:
            done.append(inputs[0].numel() // inputs[0].shape[-1] * module.weight.numel())

    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and "modulation" not in name:
            module.place = name
            module.register_forward_hook(count)
    attended = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        done.append(2 * query[0, :, :, 0].numel() * key.shape[-2] * query.shape[-1])
        return attended(query, key, value)

    frames, rows, columns, sounds, words = 3, 4, 6, 11, 13
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"), torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        transformer(
            hidden_states=torch.empty(1, frames, 2 * rows, 2 * columns, 33),
            audio_hidden_states=torch.empty(1, sounds, 40),
            encoder_hidden_states=torch.empty(1, words, 3584),
            pooled_projections=torch.empty(1, 768),
            timestep=torch.empty(1), return_dict=False,
        )  # fmt: skip
    model = SimpleNamespace(**vars(lite) | {"config": settings, "text_tokens": words})
    size = size_of(CONFIG, model)
    assert forward_flop(size, frames * rows * columns, sounds) == 2 * sum(done)


def test_bytes_of_a_block_are_what_autograd_saves():
    """Of one with Lite's proportions, but narrow, in bf16 with a LoRA under autocast."""
    video, audio = 512, 256
    narrow = {"model_dim": video, "model_dim_a": audio, "ff_dim": 4 * video, "ff_dim_a": 4 * audio}
    transformer = Kandinsky6Transformer3DModel(
        **LITE | narrow | {"num_visual_blocks": 1, "num_text_blocks": 0}
    )
    prepared(transformer.bfloat16())
    train_adapter(transformer, 32, Kandinsky6.lora_targets, lambda name: True, seed=0)
    own = {p.untyped_storage().data_ptr() for p in transformer.parameters()}

    def saved(seen, heard, read):
        held = {}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def states(count, width):
            return torch.randn(1, count, width, dtype=torch.bfloat16, requires_grad=True)

        def rope(count):
            return torch.randn(count, 1, 32, 2, 2)

        times = tuple(torch.randn(1, 512) for _ in range(2))
        mask = torch.ones(1, read, dtype=torch.bool)
        watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with watched, torch.autocast("cpu", torch.bfloat16):
            transformer.visual_transformer_blocks[0](
                states(seen, video), states(heard, audio), states(read, video),
                states(read, audio), times, rope(seen), rope(heard), mask,
            )  # fmt: skip
        return sum(held.values())

    base = saved(256, 128, 128)
    found = (
        (saved(512, 128, 128) - base) / 256 / video,
        (saved(256, 256, 128) - base) / 128 / audio,
        (saved(256, 128, 256) - base) / 128 / video,
    )
    # A narrow block saves as much for each channel, and a little for each token of its own.
    for counted, known in zip(found, KANDINSKY6_SAVED, strict=True):
        assert known * 0.9 < counted < known * 1.15


def test_the_estimate_by_the_command_line(tmp_path):
    folder = save_tiny_kandinsky6(tmp_path)
    words = ("train", "--model", folder, "--sigma", "shared", "--lora-rank", 2, "--estimate",
             "--gradient-checkpointing", "--offload", "blocks")  # fmt: skip
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.exception
    assert "47,616 and 218 tokens of picture and sound per clip" in result.stdout
    assert "host memory" in result.stdout


@pytest.mark.parametrize("size", ["Lite", "Pro"])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_card_of_a_published_base(size, rank):
    width = {"Lite": 1792, "Pro": 4096}[size]
    version = version_of({"in_visual_dim": 16, "in_audio_dim": 40, "model_dim": width})
    base = {"name": "folder", "repository": None, "version": version, "fingerprint": "0" * 16}
    text = model_card("my", base, vars(TrainConfig(lora_rank=rank)), 12, "a: 1\n", "me/my")
    card = ModelCard(text)
    assert card.data.base_model == PUBLISHED[f"6.0 {size}"]
    assert "kandinsky-6" in card.data.tags
    assert "ltx-2" not in card.data.tags
    assert ("load_lora_adapter" in text) == (COMFYUI_LORA in text) == bool(rank)
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
