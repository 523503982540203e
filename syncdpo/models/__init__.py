"""Generators behind one small protocol; whoever follows it can be trained by `syncdpo.train`.

`load_model("tiny")` is the embedded default; any other name is an LTX-2 checkpoint: a diffusers
pipeline, by folder or hub id, or a file of Lightricks. Each model is imported when it is first
asked for.
"""

from .protocol import Conditions, Model, Streams, load_model

__all__ = ["Conditions", "Model", "Streams", "load_model"]
