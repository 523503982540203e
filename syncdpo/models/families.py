"""Which family of models a checkpoint belongs to: by its own class, never by its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import diffusers

from syncdpo.models.diffusers_parts import pipeline_index, transformer_class

# Modules and classes by the class of transformer that the checkpoint's model_index.json names.
FAMILIES = {
    "LTX2VideoTransformer3DModel": ("syncdpo.models.ltx2", "LTX2"),
    "Kandinsky6Transformer3DModel": ("syncdpo.models.kandinsky6", "Kandinsky6"),
}


def family_of(name: str) -> type:
    """The class for a checkpoint: a pipeline's folder or hub id, or a `.safetensors` file.

    A file is Lightricks'; whether it is, its keys say when it is opened. Raises ValueError where
    there is no pipeline, or one of a class that no family has.
    """
    if Path(name).is_file() or name.endswith(".safetensors"):
        return _class(FAMILIES["LTX2VideoTransformer3DModel"])
    expected = "the folder or hub id of a diffusers pipeline, LTX-2 or Kandinsky 6, or a "
    index = pipeline_index(name, f"{expected}.safetensors file of Lightricks")
    found = FAMILIES.get(transformer_class(index))
    if found is None:
        raise ValueError(
            f"model: expected a pipeline of LTX-2 or Kandinsky 6 (transformer "
            f"{' or '.join(FAMILIES)}), got {index.get('_class_name', 'no class')} with "
            f"{transformer_class(index) or 'no transformer'} in {name}"
        )
    _check_diffusers(name, found[1], transformer_class(index))
    return _class(found)


def _check_diffusers(name: str, family: str, needed: str) -> None:
    if not hasattr(diffusers, needed):
        raise ValueError(
            f"model: {name} is of {family}, whose {needed} is not in diffusers "
            f"{diffusers.__version__}; pip install -U 'diffusers>=0.42,<0.43', which wants Python "
            "3.11 or later"
        )


def _class(found: tuple[str, str]) -> type:
    module, name = found
    return getattr(import_module(module), name)
