"""The Hugging Face Hub: whether it can be reached, and what its client is asked."""

import os
from pathlib import Path
from typing import Any

from acttail.errors import ModelError, reason


def _hub_reachable() -> bool:
    """Whether the Hub's name resolves: the client would retry for half a minute before saying so."""
    import socket
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def hub_arguments(name: str, hub_id: str, revision: str | None) -> dict[str, Any]:
    """Arguments for the Hub's client: the cache alone where there is no network.

    Args:
        name: what the user asked for.
        hub_id: of the repository.
        revision: None for the default.

    Raises:
        ModelError: no network, and the model is not in the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    if _hub_reachable():
        return {"revision": revision}
    try:
        cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except Exception as error:
        raise ModelError(f"{name!r} is neither a path nor a Hub id ({reason(error)})") from error
    if not isinstance(cached, str):
        raise ModelError(
            f"no model {name!r}: it is not a file or folder here, not in the Hub's cache, and "
            "the Hub cannot be reached; check the name and the network"
        )
    return {"revision": revision, "local_files_only": True}


def fetched(name: str, hub_id: str, revision: str | None) -> Path:
    """The folder in the Hub's cache that holds a repository's weights and JSON, fetched if need be.

    Args:
        name: what the user asked for.
        hub_id: of the repository.
        revision: None for the default.

    Raises:
        ModelError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id,
            **hub_arguments(name, hub_id, revision),
            allow_patterns=["*.safetensors", "*.json"],
            # The same weights in another tool's form.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot fetch {name} ({reason(error)}); check the id and the network"
        ) from error
    return Path(folder)
