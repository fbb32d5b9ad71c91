"""Mixtral: Mistral's blocks with experts instead of an MLP, whose weights sum to 1."""

from acttail.engine.families.family import TWO_NORMS, Family, Routing, every_window

MIXTRAL = Family(norms=TWO_NORMS, window=every_window, routing=Routing(normalised=True))
