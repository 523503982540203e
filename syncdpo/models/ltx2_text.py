"""Text encoders of LTX-2 that come by themselves: a folder, or Lightricks' packed file of 2.5.

The packed file holds Gemma 4's weights (names flattened for ComfyUI, or transformers' own), its
settings as JSON in the header, and tokenizer.json and other small files as bytes in tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SETTINGS, TOKENS, ASSET = "gemma_config", "tokenizer_json", "hf_asset__"
FLAT = {  # ComfyUI's names of the language model
    "model.layers.": "model.language_model.layers.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.norm.": "model.language_model.norm.",
}
LANGUAGE = "model.language_model."
KEPT = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")


def load_text_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A text encoder in transformers' own layout."""
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True
    )


def load_tokenizer_folder(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_packed_text(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The packed file's language model in transformers' class, without towers for sight and sound.

    Raises ValueError where the file lacks its settings, or one of the language model's tensors.
    """
    with safe_open(path, framework="pt") as file:
        settings = (file.metadata() or {}).get(SETTINGS)
        if settings is None:
            raise ValueError(f"text_encoder: {path} lacks {SETTINGS} in its header")
        names = list(file.keys())
        state = {_plain(name): file.get_tensor(name) for name in names if _plain(name)}
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    source = json.loads(settings)
    kind = source.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"text_encoder: {path} is a {kind!r}, which transformers does not know")
    config = CONFIG_MAPPING[kind].from_dict(
        source | {"vision_config": None, "audio_config": None, "dtype": dtype}
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config)
    found = model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    missing = [name for name in found.missing_keys if name.startswith(LANGUAGE)]
    if missing or found.unexpected_keys:
        name = min(missing or found.unexpected_keys)
        raise ValueError(
            f"text_encoder: {path} does not fit its settings: {len(missing)} tensors are missing, "
            f"{len(found.unexpected_keys)} unknown, {name} among them"
        )
    return model.to(dtype).eval()


def _plain(name: str) -> str:
    """transformers' name of a tensor of the language model, "" for any other tensor."""
    for old, new in FLAT.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name if name.startswith(LANGUAGE) else ""


def load_packed_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The packed file's tokenizer, which begins every text with <bos> as the model was trained."""
    with safe_open(path, framework="pt") as file:
        tokenizer = Tokenizer.from_buffer(_bytes(file.get_tensor(TOKENS)))
        asset = f"{ASSET}tokenizer_config.json"
        raw = (file.metadata() or {}).get("tokenizer_config.json", "{}")
        names = list(file.keys())
        if asset in names:
            raw = _bytes(file.get_tensor(asset))
    settings = {name: token for name, token in json.loads(raw).items() if name in KEPT}
    settings = {n: t["content"] if isinstance(t, dict) else t for n, t in settings.items()}
    bos = settings.get("bos_token", "<bos>")
    # Gemma 4's own tokenizer does not put it there, and diffusers asks for none.
    if tokenizer.encode("x").tokens[:1] != [bos]:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=1024, padding_side="left", **settings
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.to(torch.uint8).numpy().tobytes()
