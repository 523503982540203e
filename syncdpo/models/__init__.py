"""Generators behind one small protocol; whoever follows it can be trained by `syncdpo.train`.

`load_model("tiny")` is the embedded default, "my_model:Own" a user's own; any other name is a
checkpoint: a diffusers pipeline of LTX-2 or Kandinsky 6, by folder or hub id, or a file of
Lightricks. Each model is imported when it is first asked for. `check_model` calls every member of
one.
"""

from importlib import import_module

from .protocol import Conditions, Model, Streams, load_model

# Of files that need peft, imported when they are first asked for.
LATER = {
    "check_model": "contract",
    "draw_sigma": "noise_levels",
    "load_weights": "weights",
    "save_weights": "weights",
}

__all__ = [
    "Conditions",
    "Model",
    "Streams",
    "check_model",
    "draw_sigma",
    "load_model",
    "load_weights",
    "save_weights",
]


def __getattr__(name: str):
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LATER[name]}"), name)
