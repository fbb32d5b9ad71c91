"""An OpenAI-compatible server of one model: queue, limits, metrics and a chat page."""

from acttail.serve.app import create_app
from acttail.serve.run import run
from acttail.serve.server import Options

__all__ = ["Options", "create_app", "run"]
