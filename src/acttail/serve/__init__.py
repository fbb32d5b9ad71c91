"""An OpenAI-compatible server of one model: queue, limits, metrics and a chat page."""

from acttail.serve.app import Options, create_app
from acttail.serve.run import run

__all__ = ["Options", "create_app", "run"]
