"""Decoding engines: native kernels where they reach, transformers everywhere else."""

from acttail.engine.base import Engine
from acttail.engine.generation import Generation, Piece
from acttail.engine.lossless import lossless
from acttail.engine.native_engine import NativeEngine
from acttail.engine.open import from_model, from_pretrained
from acttail.engine.sampling import Sampling
from acttail.engine.spec import UnsupportedModelError
from acttail.engine.transformers import TransformersEngine

__all__ = [
    "Engine",
    "Generation",
    "NativeEngine",
    "Piece",
    "Sampling",
    "TransformersEngine",
    "UnsupportedModelError",
]

# Here the two ends meet: Engine offers the ways in, open knows the engines there are.
Engine._open_model = staticmethod(from_model)
Engine._open_pretrained = staticmethod(from_pretrained)
Engine._make_lossless = staticmethod(lossless)
