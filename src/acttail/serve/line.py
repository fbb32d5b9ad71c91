"""Who is next: jobs wait in one line per client, and turns go round the clients."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from acttail.serve.jobs import Job


class Line:
    """Jobs without a slot. Not safe for threads: whoever shares it locks it."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Job]:
        for line in self._lines.values():
            yield from line

    def of(self, client: str) -> int:
        """Jobs of one client."""
        return len(self._lines.get(client, ()))

    def add(self, job: Job) -> None:
        """Put a job at the end of its client's line."""
        self._lines.setdefault(job.client, deque()).append(job)

    def add_first(self, job: Job) -> None:
        """Put a job before all others."""
        self._lines.setdefault(job.client, deque()).appendleft(job)
        self._lines.move_to_end(job.client, last=False)

    def take(self) -> Job:
        """The next job; its client's turn is over.

        Raises:
            StopIteration: there is none.
        """
        client, line = next(iter(self._lines.items()))
        job = line.popleft()
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return job

    def remove(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take out the jobs of which this is true."""
        found = [job for job in self if gone(job)]
        for job in found:
            line = self._lines[job.client]
            line.remove(job)
            if not line:
                del self._lines[job.client]
        return found
