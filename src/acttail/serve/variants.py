"""One model at several sparsities: the same weights under plans made on the spot."""

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

from acttail.allocate.replan import curves_of, replan
from acttail.curves import SensitivityCurves
from acttail.errors import ActTailError

# Each holds a few hundred kilobytes of tables and scratch; the weights are shared.
_KEPT = 8
# Requests a hundredth apart would each get an engine of their own otherwise.
_STEP = 0.01


class Variants:
    """Engines of one model by sparsity.

    Args:
        engine: as it was started.
        curves: sensitivity curves of the model; those its plan names by default.
    """

    def __init__(self, engine: Any, curves: SensitivityCurves | None = None) -> None:
        self.engine = engine
        self._curves = curves
        if curves is None and engine.plan is not None:
            self._curves = curves_of(engine.plan)
        self._made: OrderedDict[float, Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def default(self) -> float:
        """Sparsity the server was started with."""
        return 0.0 if self.engine.plan is None else float(self.engine.plan.sparsity)

    @cached_property
    def fixed(self) -> str | None:
        """Why the sparsity cannot be changed, None if it can."""
        if self.engine.name != "native":
            return "the transformers engine keeps one plan; use the native engine"
        if self.engine.plan is None:
            return "the server was started without a plan"
        try:
            replan(self.engine.plan, 0.5, self._curves)
        except ActTailError as error:
            return str(error)
        return None

    def at(self, sparsity: float | None) -> Any:
        """The engine at this sparsity, rounded to a hundredth; as it was started for None.

        Raises:
            ActTailError: the sparsity cannot be changed, or is out of reach.
        """
        if sparsity is None or abs(sparsity - self.default) < 1e-9:
            return self.engine
        key = round(round(sparsity / _STEP) * _STEP, 6)
        # Dense needs no plan, only an engine that can change it.
        if self.fixed is not None and (key > 0 or self.engine.name != "native"):
            raise ActTailError(f"sparsity cannot be changed: {self.fixed}")
        with self._lock:
            if key not in self._made:
                plan = replan(self.engine.plan, key, self._curves) if key > 0 else None
                self._made[key] = self.engine.with_plan(plan)
            self._made.move_to_end(key)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)  # jobs that run on it keep it alive
            return self._made[key]
