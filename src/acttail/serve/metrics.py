"""What GET /metrics tells Prometheus."""

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from acttail.engine.protocol import TokenEngine
from acttail.serve.wording import realised

if TYPE_CHECKING:
    from acttail.serve.jobs import Job
    from acttail.serve.scheduler import Scheduler

_MODELS = "/v1/models/"
_PATHS = frozenset(
    ("/", "/about", "/health", "/metrics", "/tokenize", "/detokenize", "/v1/models", "/v1/completions",
     "/v1/chat/completions")
)  # fmt: skip
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


def path_label(path: str) -> str:
    """How a path is counted; one that is none of ours is no label of its own."""
    return path if path in _PATHS else "/v1/models" if path.startswith(_MODELS) else "other"


class Metrics:
    """Counters of one server.

    Args:
        engine: that it was started with.
    """

    def __init__(self, engine: TokenEngine) -> None:
        self.registry = CollectorRegistry()
        self.answered = 0

        def named(kind: Any, name: str, help_: str, *labels: str, **more: Any) -> Any:
            return kind(f"acttail_{name}", help_, labels, registry=self.registry, **more)

        self.requests = named(Counter, "requests", "Requests answered.", "path", "status")
        self.stream_errors = named(
            Counter, "stream_errors", "Streams that ended with an error event.", "status"
        )
        self.prompt_tokens = named(Counter, "prompt_tokens", "Tokens of prompts.")
        self.generated_tokens = named(Counter, "generated_tokens", "Tokens generated.")
        self.drafted_tokens = named(
            Counter,
            "drafted_tokens",
            "Tokens that were drafted and verified, where decoding is lossless.",
        )
        self.accepted_tokens = named(
            Counter, "accepted_tokens", "Of the drafted tokens, those kept."
        )
        self.first_token = named(
            Histogram,
            "first_token_seconds",
            "From request to first token.",
            buckets=_SECONDS,
        )
        self.next_token = named(
            Histogram,
            "token_seconds",
            "Between two tokens of a request.",
            buckets=_SECONDS,
        )
        self.speed = named(Gauge, "tokens_per_second", "Decoded by the request that ended last.")
        self.sparsity = named(
            Gauge,
            "realised_sparsity",
            "Share of the projections' inputs dropped, last request.",
        )
        self.read = named(
            Gauge,
            "weights_read_ratio",
            "Share of the projections' weights read per token, last request.",
        )
        self.waiting = named(Gauge, "queue_length", "Requests waiting for a slot.")
        self.running = named(Gauge, "running", "Requests being decoded.")
        self.preemptions = named(
            Counter, "preemptions", "Times a request gave its KV memory up to others that ran."
        )
        named(
            Gauge, "kv_bytes", "Memory of all KV caches, those kept for later requests included."
        ).set_function(lambda: engine.kv_bytes)
        planned = named(Gauge, "plan_sparsity", "Sparsity of the plan the server was started with.")
        planned.set(engine.plan.sparsity if engine.plan else 0.0)

    def watch(self, scheduler: "Scheduler") -> None:
        """Read the queue when asked for."""
        self.waiting.set_function(lambda: scheduler.waiting)
        self.running.set_function(lambda: scheduler.running)

    def response(self, path: str, status: int) -> None:
        """Count a response."""
        self.answered += 1
        self.requests.labels(path_label(path), status).inc()

    def token(self, job: "Job", gap: float | None) -> None:
        """Count a token; called from the scheduler's thread."""
        self.generated_tokens.inc()
        if gap is not None:
            self.next_token.observe(gap)
        elif job.first_token is not None:
            self.prompt_tokens.inc(job.result.prompt_tokens)
            self.first_token.observe(job.first_token - job.submitted)

    def drafts(self, drafted: int, accepted: int) -> None:
        """Count what became of drafts; called from the scheduler's thread."""
        self.drafted_tokens.inc(drafted)
        self.accepted_tokens.inc(accepted)

    def preempted(self, job: "Job") -> None:
        """Count a request that starts again later; called from the scheduler's thread."""
        self.preemptions.inc()

    def ended(self, job: "Job") -> None:
        """Note how a request went."""
        if len(job.result.tokens) > 1:
            self.speed.set(job.result.tokens_per_second)
            self.sparsity.set(realised(job.engine, job.read_share) or 0.0)
            self.read.set(job.read_share)

    def page(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
