"""What a stranger imports: the rooms' own names, the README's lines, and no more than is needed."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "demo", "metrics", "models", "negatives", "ops", "report", "training")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_exports_what_it_names(room):
    module = importlib.import_module(f"syncdpo.{room}")
    assert len(module.__doc__.split()) >= 12
    assert module.__all__ == sorted(module.__all__, key=order)
    assert all(
        getattr(module, name).__doc__ for name in module.__all__ if callable_of(module, name)
    )


def order(name: str) -> tuple[bool, bool, str]:
    """Constants, classes, functions: as ruff sorts them."""
    return not name.isupper(), name[0].islower(), name


def callable_of(module, name: str) -> bool:
    return getattr(getattr(module, name), "__module__", "").startswith("syncdpo")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/rules.md", "docs/losses.md", "docs/kernels.md"]
)
def test_every_import_of_a_page_works(page):
    lines = re.findall(r"^from syncdpo.* import [\w, ]+$", (ROOT / page).read_text(), re.M)
    for line in lines:
        exec(line, {})
    assert lines or page != "README.md"


def test_the_core_needs_torch_alone():
    """Ops, negatives and metrics come without the extras; the settings even without torch."""
    blocked = ("av", "accelerate", "diffusers", "peft", "safetensors", "torchaudio", "tqdm",
               "transformers", "typer", "matplotlib", "librosa", "cv2")  # fmt: skip
    program = f"""
import sys
sys.modules |= dict.fromkeys({blocked!r})
import syncdpo.training
from syncdpo.training import TrainConfig
assert "torch" not in sys.modules
from syncdpo import ops
from syncdpo.negatives import Timeline, make_pairs, parse_rule
from syncdpo.metrics import clip_metrics, summarise
from syncdpo.info import describe
sys.argv[1:] = ["info"]
from syncdpo.__main__ import main
main()
sys.argv[1:] = ["train"]
main()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.strip().endswith("need the training extras: pip install 'syncdpo[train]'")
    assert "replace_segments" in ran.stdout


def test_the_readme_s_python_runs():
    """Its blocks as they stand, with a transformer that only mixes what it is given."""
    pages = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    loss, losers = pages
    shapes = ((2, 16 * 384, 8), (2, 126, 8))
    torch.manual_seed(0)
    video, audio = (torch.randn(shape) for shape in shapes)
    names = {"torch": torch, "video": video, "audio": audio}
    exec(losers, names)
    pairs = names["pairs"]
    assert pairs.valid.all()
    policy, frozen = (Mixing() for _ in range(2))
    names |= {"win": pairs.win, "lose": pairs.lose, "transformer": policy, "frozen": frozen}
    exec(loss, names | {"sigma": torch.tensor([0.3, 0.8]), "seed": torch.tensor([1, 2])})
    assert all(p.grad.abs().sum() > 0 for p in policy.parameters())


class Mixing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.video, self.audio = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, video, audio, sigma):
        return self.video(video) * sigma[:, None, None], self.audio(audio)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
