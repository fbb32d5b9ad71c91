"""Ray Serve's choice of a replica for each request, as :mod:`acttail.serve.sticky` makes it.

Imported by name, in the process that asks; see :mod:`acttail.serve.cluster`.
"""

from typing import Any

from ray.serve.request_router import RequestRouter

from acttail.serve.sticky import chosen


class StickyRouter(RequestRouter):  # type: ignore[misc]
    """Sends a conversation to the replica that has its KV caches, while that one is not much busier than others."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """The replicas to try: the chosen one, then whichever of the others has least to do.

        Args:
            candidate_replicas: that there are.
            pending_request: of :meth:`acttail.serve.replica.Replica.ask`; None where it is none in particular.
        """
        known = {r.replica_id.unique_id: r for r in candidate_replicas}
        if not known:
            return []
        counts = self.replica_queue_len_cache
        busy = {name: counts.get(r.replica_id) or 0 for name, r in known.items()}
        asked = {} if pending_request is None else pending_request.kwargs
        first = known.pop(chosen(asked.get("conversation"), busy))
        return [[first], list(known.values())]
