"""What a run says of its weights, in the file and in a card beside it, and the way to the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from syncdpo.data.files import write_atomic
from syncdpo.models import Model
from syncdpo.models.base_model import fingerprint, version_of
from syncdpo.models.model_card import model_card
from syncdpo.models.own import is_own
from syncdpo.models.weights import COMFYUI_LORA, FULL, LORA, weights_in
from syncdpo.training.config import TrainConfig, dump_config

CARD = "README.md"
WEIGHTS = (LORA, COMFYUI_LORA, FULL)
BESIDE = ("config.json", CARD)  # what goes to the hub beside the weights; logs stay
PATHS = (
    "data", "validation_data", "output", "model", "weights", "sample_pictures", "sample_captions",
)  # fmt: skip


def check(config: TrainConfig) -> None:
    """Raises ValueError, before anything is trained, where the hub could not take the weights."""
    if not config.push_to_hub:
        return
    try:
        validate_repo_id(config.push_to_hub)
    except ValueError as error:
        raise ValueError(f"push_to_hub: {error}") from error
    if not get_token():
        raise ValueError(
            "push_to_hub: expected to be logged in to the hub: run `hf auth login`, or set HF_TOKEN"
        )


def about(config: TrainConfig, model: Model) -> dict[str, str]:
    """The metadata of the run's weights. The model must be as its checkpoint is, nothing loaded."""
    told = {
        "base_model": shareable(config).model,
        "base_fingerprint": fingerprint(model.transformer),
        "method": config.method,
        "settings": json.dumps(asdict(shareable(config))),
    }
    version = version_of(getattr(model.transformer, "config", None))
    return told | ({"base_version": version} if version else {})


def shareable(config: TrainConfig) -> TrainConfig:
    """The settings without the folders of this machine: their last names stay, and hub ids."""
    kept = {name: getattr(config, name) for name in PATHS}
    return replace(
        config,
        **{
            name: Path(value).name
            for name, value in kept.items()
            if value
            and not (name == "model" and on_hub(value))
            and not (name == "sample_captions" and not value.endswith(".txt"))
        },
    )


def on_hub(name: str) -> bool:
    """Whether a model's name is a repository of the hub: `owner/name`, and no folder here."""
    if is_own(name):
        return False
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def write_card(config: TrainConfig, told: Mapping[str, str], clips: int) -> None:
    """The card of the run's weights, beside them."""
    base = {
        "name": told["base_model"],
        "repository": config.model if on_hub(config.model) else None,
        # A model of the user's own may have LTX-2's transformer, and is not LTX-2 for that.
        "version": None if is_own(config.model) else told.get("base_version"),
        "fingerprint": told["base_fingerprint"],
    }
    title = (config.push_to_hub or Path(config.output).resolve().name).rpartition("/")[2]
    settings = shareable(config)
    card = model_card(
        title,
        base,
        asdict(settings),
        clips,
        dump_config(settings),
        config.push_to_hub,
        told.get("step", ""),
    )
    write_atomic(Path(config.output) / CARD, card.encode())


def upload(folder: Path, repository: str) -> str:
    """Weights and card to a repository of the hub, made, private, where there is none; → its URL.

    Raises OSError, in one sentence, whatever went wrong: the weights are still in `folder`.
    """
    # By our names; a model of the user's own may have others.
    weights = [n for n in WEIGHTS if (folder / n).is_file()] or weights_in(folder)
    files = [*weights, *(name for name in BESIDE if (folder / name).is_file())]
    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Weights trained by syncdpo",
        )
    except Exception as error:  # the client has no one class for what networks do
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(
            f"push_to_hub: {repository} did not take the weights ({reason}); they are in {folder}, "
            f"and `hf upload {repository} {folder} --include {' '.join(files)}` tries again"
        ) from error
    return f"https://huggingface.co/{repository}"
