"""One model at several sparsities: the same weights under plans made on the spot."""

import threading
from collections import OrderedDict
from functools import cached_property

from acttail.allocate.replan import curves_of, replan
from acttail.calibrate.curves import SensitivityCurves
from acttail.engine.base import Engine
from acttail.engine.native_engine import NativeEngine
from acttail.engine.uniform import uniform_plan
from acttail.errors import ActTailError

# Each holds a few hundred kilobytes of tables and scratch; the weights are shared.
_KEPT = 8
# Sparsities a hundredth apart would each get an engine of their own otherwise.
_STEP = 0.01
# Of the plan that stands in for none; any would do.
_BASE = 0.5


class Variants:
    """Engines of one model by sparsity.

    Args:
        engine: as it was started.
        curves: sensitivity curves of the model; those its plan names by default. They make plans for a model
            that was started without one, too.
        uniform: where there is neither a plan nor curves, drop the same share everywhere.
    """

    def __init__(
        self, engine: Engine, curves: SensitivityCurves | None = None, *, uniform: bool = False
    ) -> None:  # fmt: skip
        self.engine = engine
        self._plan, self._curves = engine.plan, curves
        started = self.default
        if self._plan is None and isinstance(engine, NativeEngine) and (curves or uniform):
            self._plan, started = uniform_plan(engine, _BASE), _BASE
        if curves is None and self._plan is not None:
            self._curves = curves_of(self._plan)
        self._base = started
        self._made: OrderedDict[float, NativeEngine] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def default(self) -> float:
        """Sparsity the engine was started with."""
        return 0.0 if self.engine.plan is None else float(self.engine.plan.sparsity)

    @cached_property
    def fixed(self) -> str | None:
        """Why the sparsity cannot be changed, None if it can."""
        if not isinstance(self.engine, NativeEngine):
            return self.engine.one_plan
        if self._plan is None:
            return "the model was started without a plan"
        try:
            replan(self._plan, self._base, self._curves)
        except ActTailError as error:
            return str(error)
        return None

    def at(self, sparsity: float | None) -> Engine:
        """The engine at this sparsity, rounded to a hundredth; as it was started for None.

        Raises:
            ActTailError: the sparsity cannot be changed, or is out of reach.
        """
        if sparsity is None or abs(sparsity - self.default) < 1e-9:
            return self.engine
        engine, plan = self.engine, self._plan
        key = round(round(sparsity / _STEP) * _STEP, 6)
        # Dense needs no plan, only an engine that can change it.
        if not isinstance(engine, NativeEngine) or (self.fixed is not None and key > 0):
            raise ActTailError(f"sparsity cannot be changed: {self.fixed}")
        with self._lock:
            if key not in self._made:
                other = replan(plan, key, self._curves) if key > 0 and plan is not None else None
                self._made[key] = engine.with_own_plan(other)
            self._made.move_to_end(key)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)  # jobs that run on it keep it alive
            return self._made[key]
