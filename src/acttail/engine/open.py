"""Open a model for generation: the only place that chooses between native kernels and transformers."""

import os
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from acttail.base.dtypes import name_of
from acttail.base.memory import give_back
from acttail.base.progress import Progress
from acttail.engine import kept
from acttail.engine.base import Engine
from acttail.engine.config import EngineConfig
from acttail.engine.convert import Conversion, convert_in_memory
from acttail.engine.describe import describe
from acttail.engine.known import Known, KnownLater
from acttail.engine.native import library
from acttail.engine.native_engine import NativeEngine
from acttail.engine.packed_weights import PackedWeights, Sketches, sketches_of, write_sketches
from acttail.engine.source import folder_tokenizer, open_for_engine
from acttail.engine.spec import UnsupportedModelError, check_rule
from acttail.engine.store import read_folder
from acttail.engine.text import eos_of
from acttail.engine.transformers import TransformersEngine
from acttail.errors import ActTailError, ActTailWarning
from acttail.model.names import PackedSource, is_packed
from acttail.model.opened import Opened, open_model
from acttail.model.weights import LoadedWeights, WeightSource
from acttail.plan import SparsityPlan
from acttail.sparse.state import sparse_state


def from_model(
    model: Any, plan: SparsityPlan | None, config: EngineConfig, *, tokenizer: Any = None,
    native: bool | None = None, progress: Progress | None = None,
) -> Engine:  # fmt: skip
    """See :meth:`acttail.engine.Engine.from_model`."""
    weights = LoadedWeights(model)
    state = sparse_state(model)
    plan = plan or (state.plan if state else None)
    if plan is not None:
        plan.check(weights)
    reason = "transformers was asked for"
    if native is not False:
        try:
            check_rule(plan)
            _require_library()
            conversion = Conversion(describe(model), weights, config, plan=plan)
            packed = convert_in_memory(conversion, progress, state.policy if state else None)
            eos = eos_of(model.generation_config, tokenizer)
            check = Known(weights).check
            return NativeEngine(packed, plan, config, tokenizer=tokenizer, eos=eos, check=check)
        except (UnsupportedModelError, _NotAvailableError) as error:
            if native:
                error.args = (f"{error}; leave out the native engine and transformers runs it",)
                raise
            reason = str(error)
    return _transformers(model, plan, config, tokenizer, reason, warn=native is None)


def from_pretrained(
    model: str | os.PathLike[str] | Opened, plan: SparsityPlan | str | None, config: EngineConfig, *,
    native: bool | None = None, progress: Progress | None = None,
) -> Engine:  # fmt: skip
    """See :meth:`acttail.engine.Engine.from_pretrained`."""
    loaded = SparsityPlan.load(plan) if isinstance(plan, str) else plan
    opened = open_model(model)
    reason = "transformers was asked for"
    start = _from_folder if isinstance(opened.source, PackedSource) else _from_source
    if native is not False:
        try:
            return start(opened, loaded, config, progress)
        except (UnsupportedModelError, _NotAvailableError) as error:
            if native:
                error.args = (f"{error}; leave out the native engine and transformers runs it",)
                raise
            reason = str(error)
    runs = config.weights.transformers
    config.check_transformers(runs, reason)
    lm, tokenizer = opened.load(dtype=runs, progress=progress)
    return _transformers(lm, loaded, config, tokenizer, reason, warn=native is None)


class _NotAvailableError(ActTailError):
    """There is no native library here."""


def _require_library() -> None:
    try:
        library()
    except ActTailError as error:
        raise _NotAvailableError(str(error)) from error


def _transformers(
    model: Any, plan: SparsityPlan | None, config: EngineConfig, tokenizer: Any, reason: str, *,
    warn: bool,
) -> TransformersEngine:  # fmt: skip
    """What runs where the native engine does not, unless that would drop what was asked for."""
    runs = name_of(model.dtype)
    config.check_transformers(runs, reason)
    state = sparse_state(model)
    if state is not None:
        plan = plan or state.plan
    if plan is not None:
        plan.check(LoadedWeights(model))
    if warn:
        # Past the doors of this module and of Engine, to whoever called them.
        message = f"{reason}; transformers runs it instead, in {runs}"
        warnings.warn(message, ActTailWarning, stacklevel=4)
    policy = config.policy(state.policy if state else None)
    return TransformersEngine(model, plan, tokenizer, policy, reason)


def _from_source(
    model: Opened, plan: SparsityPlan | None, config: EngineConfig, progress: Progress | None,
) -> NativeEngine:  # fmt: skip
    check_rule(plan)
    _require_library()
    at = None if model.trust_remote_code else kept.place_of(model.source, config, plan)
    found = _kept(at, model, plan, config)
    if found is not None:
        return found
    opened = open_for_engine(model, own_blocks=config.own_blocks)
    # A checkpoint saved sparse stays so.
    plan = plan or opened.plan
    check_rule(plan)
    if plan is not None:
        plan.check(opened.weights)
    # What is kept serves other plans too.
    conversion = Conversion(opened.spec, opened.weights, config, plan=plan, ordered=at is None)
    rounded = conversion.rounded()
    if rounded is not None:
        warnings.warn(rounded, ActTailWarning, stacklevel=4)
    tokenizer = opened.tokenizer()
    give_back()
    packed = convert_in_memory(conversion, progress, opened.prefill)
    eos = eos_of(opened.generation_config, tokenizer)
    if at is not None:
        # With the plan of the checkpoint, not the one asked for: the next start may ask for none.
        kept.keep(at, replace(packed, plan=opened.plan), tokenizer, eos)
        if plan is not None:
            _note_sketches(at, opened.weights)
    check = _known_later(model, at).check
    return NativeEngine(packed, plan, config, tokenizer=tokenizer, eos=eos, check=check)


def _kept(
    at: Path | None, model: Opened, plan: SparsityPlan | None, config: EngineConfig
) -> NativeEngine | None:
    """The engine of what an earlier start converted; None if it is not there, or damaged."""
    if at is None or not is_packed(at):
        return None
    try:
        tokenizer, eos = _tokenizer_first(at)
        packed = read_folder(at)
        weights = PackedWeights(model.name, at) if plan is not None else None
    except (ActTailError, OSError):
        kept.discard(at)
        return None
    if weights is not None and plan is not None:
        if not weights.sketches:
            # Packing loses what a sketch tells models apart by, so those of the source are kept beside.
            weights.sketches = _note_sketches(at, model.weights)
        weights.check(plan)
    kept.touch(at)
    packed = replace(packed, layout=replace(packed.layout, source=model.name))
    check = _known_later(model, at).check
    return NativeEngine(
        packed, plan or packed.plan, config, tokenizer=tokenizer, eos=eos, check=check
    )


def _tokenizer_first(folder: Path) -> tuple[Any, frozenset[int]]:
    """A folder's tokenizer, whose making takes three times what it keeps: before the weights take their place."""
    found = folder_tokenizer(folder)
    give_back()
    return found


def _known_later(model: Opened, at: Path | None) -> KnownLater:
    """What a model is known by, read when it is asked for: from what is kept of it, else from the model."""

    def weights() -> WeightSource:
        if at is not None and is_packed(at):
            with suppress(ActTailError):
                kept_ones = PackedWeights(model.name, at)
                if kept_ones.sketches:
                    return kept_ones
        # Another than `model`, which would hold its file open as long as the engine lives.
        again = Opened(model.source, model.asked, trust_remote_code=model.trust_remote_code)
        return again.weights

    return KnownLater(weights)


def _note_sketches(at: Path, weights: WeightSource) -> Sketches:
    """Keep the sketches of a model's weights beside its packed ones, where that can be."""
    found = sketches_of(weights)
    if is_packed(at):
        with suppress(ActTailError):
            write_sketches(at, found)
    return found


def _from_folder(
    model: Opened, plan: SparsityPlan | None, config: EngineConfig, progress: Progress | None,
) -> NativeEngine:  # fmt: skip
    check_rule(plan)
    _require_library()
    source, weights = model.source, model.stored
    assert isinstance(source, PackedSource)  # noqa: S101
    assert isinstance(weights, PackedWeights)  # noqa: S101
    weights.check(plan)
    tokenizer, eos = _tokenizer_first(source.path)
    packed = read_folder(source.path)
    config.check_folder(source, packed.layout.dtype, packed.layout.head_dtype)
    return NativeEngine(
        packed, plan or packed.plan, config, tokenizer=tokenizer, eos=eos, check=weights.check
    )
