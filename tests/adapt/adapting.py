"""Small models and texts that are adapted in the tests."""

from families import tempered

from acttail import make_plan
from acttail.adapt.settings import Settings
from acttail.calibrate.text import Text

# Of few letters, so that a dozen steps can learn something of it.
TEXT = Text("fox@1", "the quick brown fox jumps over the lazy dog and then again. " * 30)


def lively(family="llama", factor=8, **changes):
    """A tiny random model that says something of its own, for the bytes of a text."""
    return tempered(family, factor, **{"vocab_size": 260, **changes})


def planned(model, sparsity=0.6, allocator="uniform", **more):
    return make_plan(model, sparsity, allocator=allocator, **more)


def settings(**changes):
    """A run of a few steps over tiny windows."""
    base = {
        "train": ("lora",), "minutes": None, "steps": 4, "window": 32, "batch": 4, "rank": 4, "held_out": 64,
        "evaluations": 2, "learning_rate": 10.0,
    }  # fmt: skip
    return Settings(**(base | changes))
