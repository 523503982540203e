"""The card that goes with trained weights: what they are, of what, and how each tool loads them."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import ModelCardData

from syncdpo.models.weights import COMFYUI_LORA, FULL, LORA

# Bases in diffusers' format: what a card names for one that was loaded from a folder.
PUBLISHED = {
    "2.0": "Lightricks/LTX-2",
    "2.3": "dg845/LTX-2.3-Diffusers",
    "2.5": "Lightricks/LTX-2.5-Diffusers",
    "6.0 Lite": "kandinskylab/Kandinsky-6.0-Lite-5s-Diffusers",
    "6.0 Pro": "kandinskylab/Kandinsky-6.0-Pro-5s-Diffusers",
}
KANDINSKY6 = "6.0"  # how versions of Kandinsky begin
METHODS = {
    "sft": "supervised fine-tuning",
    "syncdpo": "SyncDPO (arXiv 2605.12179): preferring synchronised clips over the same clips with "
    "their timing distorted",
    "dpo": "DPO (Diffusion-DPO's loss, of picture and sound together) on pairs of clips that were "
    "given, one preferred over the other",
}
FACTS = (  # of the settings, those that the card's table shows
    "method", "rules", "matched", "curriculum", "trained", "lora_rank", "steps", "learning_rate",
    "beta_video", "beta_audio", "reference",
)  # fmt: skip
OF_RULES = {"rules", "matched", "curriculum"}
OF_PAIRS = {"beta_video", "beta_audio", "reference"}
LEFT_OUT = {"sft": OF_RULES | OF_PAIRS, "dpo": OF_RULES}  # facts that say nothing of a method
# What diffusers calls a family's pipeline and transformer.
CLASSES = {
    "LTX2": ("LTX2Pipeline", "LTX2VideoTransformer3DModel"),
    "Kandinsky6": ("Kandinsky6TI2VAPipeline", "Kandinsky6Transformer3DModel"),
}


def model_card(
    title: str,
    base: Mapping[str, str | None],
    settings: Mapping[str, object],
    clips: int,
    all_settings: str,
    repository: str = "",
    step: str = "",
) -> str:
    """README.md for the weights of a run: YAML that the hub reads, then text for people.

    base: "name" as the run named it, "repository" of the hub or None, "version" or None,
        "fingerprint".
    settings: of the run, by name; all_settings: all of them as yaml. clips: how many it saw, of
        `dpo` how many pairs.
    repository: of the hub, where these weights will be; a folder's name stands for it else.
    step: after which of its steps they were what they are; the last one by default.
    """
    lora = bool(settings["lora_rank"])
    published = base["repository"] or PUBLISHED.get(base["version"] or "")
    if base["name"] == "tiny":
        published = None
    data = ModelCardData(
        base_model=published,
        base_model_relation=("adapter" if lora else "finetune") if published else None,
        library_name=None if _is_own(base) else "diffusers",
        pipeline_tag="text-to-video" if published else None,
        tags=["syncdpo", "audio-video", "synchronisation"]
        + ["lora"] * lora
        + ["kandinsky-6" if _of_kandinsky6(base) else "ltx-2"] * bool(published),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"{'A LoRA for' if lora else 'All weights of'} {_base(base)}, from "
        f"{METHODS[str(settings['method'])]}. The base's licence applies to them.",
        _facts(base, settings, clips, step),
        "## How to load it",
        _loading(lora, published, base, repository or title),
        "## All settings",
        f"```yaml\n{all_settings}```",
    ]
    return "\n\n".join(parts) + "\n"


def _base(base: Mapping[str, str | None]) -> str:
    if base["name"] == "tiny":
        return "the embedded model of syncdpo"
    if _is_own(base):
        return f"the model `{base['name']}`"
    if _of_kandinsky6(base):
        return f"Kandinsky {base['version']} (`{base['name']}`)"
    return f"LTX-2 of version {base['version']} (`{base['name']}`)"


def _is_own(base: Mapping[str, str | None]) -> bool:
    """Whether it is a model of the user's own, which no other tool knows of."""
    return base["name"] != "tiny" and base["version"] is None


def _of_kandinsky6(base: Mapping[str, str | None]) -> bool:
    return (base["version"] or "").startswith(KANDINSKY6)


def _facts(
    base: Mapping[str, str | None], settings: Mapping[str, object], clips: int, step: str
) -> str:
    method = str(settings["method"])
    shown = [name for name in FACTS if name not in LEFT_OUT.get(method, ())]
    data = ("pairs" if method == "dpo" else "clips", clips)
    rows = [("base", f"`{base['name']}`, weights `{base['fingerprint']}`"), data]
    rows += [(name.replace("_", " "), f"`{settings[name]}`") for name in shown]
    rows += [("weights of step", f"`{step}`")] * bool(step)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _loading(
    lora: bool, published: str | None, base: Mapping[str, str | None], repository: str
) -> str:
    file = LORA if lora else FULL
    ours = f"""**syncdpo**

    syncdpo sample --model {base["repository"] or base["name"]} --weights {file}"""
    if _is_own(base):
        return (
            f"{ours}\n\nThe model's own code comes first: `{base['name']}` is a module of Python. "
            "The tensors are called as its modules are."
        )
    if published is None:
        return f"{ours}\n\nNo other tool has this base."
    if _of_kandinsky6(base):
        return _loading_kandinsky6(lora, published, repository, ours)
    if not lora:
        return f"""{_whole_in_diffusers("LTX2", repository, published)}

**ComfyUI** and **ltx-pipelines** load whole transformers under Lightricks' own names, which these
are not; a LoRA they would load.

{ours}"""
    return f"""**diffusers**

```python
import torch
from diffusers import LTX2Pipeline

pipeline = LTX2Pipeline.from_pretrained("{published}", dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights("{repository}", weight_name="{file}")
```

**ComfyUI**: put `{file}` into `models/loras`, under any name, and a *LoraLoaderModelOnly* behind
the loader of the LTX-2 checkpoint, strength 1.

**ltx-pipelines**, beside a pipeline's other options:

    python -m ltx_pipelines.ti2vid_one_stage --lora {file} 1.0

{ours}

Alpha equals the rank, so strength 1 is what was trained."""


def _whole_in_diffusers(family: str, repository: str, published: str) -> str:
    pipeline, transformer = CLASSES[family]
    return f"""**diffusers**

```python
import torch
from diffusers import {pipeline}, {transformer}

transformer = {transformer}.from_pretrained("{repository}", dtype=torch.bfloat16)
pipeline = {pipeline}.from_pretrained(
    "{published}", transformer=transformer, dtype=torch.bfloat16
)
```"""


def _loading_kandinsky6(lora: bool, published: str, repository: str, ours: str) -> str:
    if not lora:
        return f"""{_whole_in_diffusers("Kandinsky6", repository, published)}

{ours}"""
    return f"""**diffusers**

```python
import torch
from diffusers import Kandinsky6TI2VAPipeline

pipeline = Kandinsky6TI2VAPipeline.from_pretrained("{published}", dtype=torch.bfloat16).to("cuda")
pipeline.transformer.load_lora_adapter("{repository}", weight_name="{LORA}")
```

**ComfyUI**: put `{COMFYUI_LORA}` into `models/loras`, under any name, and a *LoraLoaderModelOnly*
behind the loader of the Kandinsky 6 checkpoint, strength 1. Its names are those of ComfyUI's own
Kandinsky 6; it was not tried there.

{ours}

Alpha equals the rank, so strength 1 is what was trained."""
