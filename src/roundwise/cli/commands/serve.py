"""`roundwise serve`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roundwise.cli.options import (
    API_KEY_VARIABLE,
    ChatTemplateOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
)
from roundwise.cli.output import print_json, print_note
from roundwise.system.console import console

if TYPE_CHECKING:
    from roundwise.inference.serving.engines.engine import Engine
    from roundwise.inference.serving.protocol import Limits

#: Tokens of prompt and answer if neither the user nor the model sets a limit.
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class RequestLimits:
    """Limits of the transformers server that were given; None: the server's default."""

    max_tokens: int | None
    max_requests: int | None
    max_batch: int | None
    max_bytes: int | None
    timeout: float | None

    def given(self) -> dict[str, Any]:
        """Returns only the limits that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Endpoint:
    """Address of the server, and the name of its model."""

    name: str
    host: str
    port: int
    api_key: str | None
    as_json: bool
    """Announce it as one JSON object too."""

    def announce(self, backend: str, reason: str, port: int) -> None:
        """Prints the server's URL; at once, even into a pipe, because the command keeps running.

        Args:
            backend: vllm or transformers.
            reason: why this backend was chosen.
            port: the real one, where 0 was asked for.
        """
        url = f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{port}/v1"
        if self.as_json:
            print_json({"url": url, "model": self.name, "backend": backend, "reason": reason})
            sys.stdout.flush()
        console.print(
            f"serving {self.name} on {url} with {backend} ({reason})", highlight=False,
            soft_wrap=True, markup=False,
        )  # fmt: skip


def command(
    model: ModelArgument,
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: more arguments for vLLM.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Server: vllm, transformers, or auto (vLLM if it is installed and supports the model)."
        ),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0: any free port.", min=0, max=65535)
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model for clients (default: the last part of MODEL)."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY_VARIABLE, help="API key that clients must send."),
    ] = None,
    chat_template: ChatTemplateOption = None,
    dtype: DtypeOption = "auto",
    device: Annotated[
        str, typer.Option(help="Device to compute on: auto, cpu or cuda (transformers).")
    ] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option(help="GPUs to split the model over (vLLM).", min=1)
    ] = 1,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Maximum tokens of prompt and answer (default: the model's).", min=2),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens of an answer (transformers).", min=1)
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(
            help="Maximum requests running and waiting (transformers; default: 32).", min=1
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Maximum requests computed together; 1: one by one (transformers; default: 16).",
            min=1,
            max=256,
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(help="Maximum request size in bytes (transformers; default: 2000000).", min=1),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Maximum seconds for a request (transformers; default: 600).", min=0.1),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a model over HTTP with OpenAI's API; by default, only to this machine."""
    import torch

    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.errors import ConfigError
    from roundwise.inference.load import parse_dtype
    from roundwise.inference.serving import launch, vllm
    from roundwise.system.hub import local_folder

    parse_dtype(dtype)  # refuses unknown names before anything is loaded
    _check_api_key(api_key)
    folder = local_folder(model)
    checkpoint = Checkpoint(folder)
    name = name or (Path(model).resolve().name if Path(model).exists() else model)
    endpoint = Endpoint(name, host, port, api_key, as_json)
    limits = RequestLimits(max_tokens, max_requests, max_batch, max_bytes, timeout)
    vllm_command, reason = launch.choose_backend(
        backend, checkpoint.config, dtype=dtype, gpu=torch.cuda.is_available()
    )
    if vllm_command is not None:
        if limits.given():
            raise ConfigError(
                f"--{next(iter(limits.given())).replace('_', '-')} is for the transformers backend: "
                "use --backend transformers, or vLLM's own arguments after --"
            )
        gpu = torch.cuda.is_available()
        quantization, _ = vllm.quantization_option(checkpoint.config, dtype=dtype, gpu=gpu)
        options = vllm.VllmOptions(
            name, host, port, dtype, max_model_len, tensor_parallel, chat_template,
            tuple(extra or ()), quantization,
        )  # fmt: skip
        endpoint.announce("vllm", reason, port)
        if api_key:
            os.environ["VLLM_API_KEY"] = api_key
        line = vllm.command_line(vllm_command, folder, options)
        os.execv(line[0], line)  # noqa: S606  # no shell: vLLM replaces this process
    if extra or tensor_parallel > 1:
        raise ConfigError(
            f"{' '.join(extra) if extra else '--tensor-parallel'} is for vLLM, and the backend is "
            f"transformers ({reason})"
        )
    _serve_with_transformers(
        folder, endpoint, reason, dtype=dtype, device=device, chat_template=chat_template,
        context=max_model_len, limits=limits,
    )  # fmt: skip


def _check_api_key(key: str | None) -> None:
    """Fails if the API key is empty or cannot be sent in a header: the server would be open to all."""
    from roundwise.errors import ConfigError

    key = os.environ.get(API_KEY_VARIABLE) if key is None else key  # typer drops an empty variable
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            "the API key must be printable ASCII characters without spaces, at least one: check "
            f"--api-key and {API_KEY_VARIABLE}"
        )


def _serve_with_transformers(
    folder: Path,
    endpoint: Endpoint,
    reason: str,
    *,
    dtype: str,
    device: str,
    chat_template: Path | None,
    context: int | None,
    limits: RequestLimits,
) -> None:
    """Loads the model and serves it in this process.

    Args:
        folder: of the checkpoint.
        endpoint: address, and name of the model.
        reason: why this backend was chosen.
        dtype, device, chat_template: as given to the command.
        context: maximum tokens of prompt and answer; None: the model's.
        limits: what a client may ask.
    """
    from roundwise.inference.serving import launch

    launch.check_installed()

    from roundwise.errors import ConfigError
    from roundwise.inference.load import load, parse_dtype, require_tokenizer
    from roundwise.inference.prompts import read_chat_template
    from roundwise.inference.sampling import unsupported_fields
    from roundwise.inference.serving.app import LOCAL_NAMES, Server
    from roundwise.inference.serving.protocol import Limits
    from roundwise.model.build import context_length
    from roundwise.system.device import parse_device

    with launch.bind_socket(endpoint.host, endpoint.port) as sock:
        loaded, tokenizer = load(folder, dtype=parse_dtype(dtype), device=parse_device(device))
        require_tokenizer(tokenizer, folder)
        if chat_template is not None:
            read_chat_template(tokenizer, chat_template)
        if unused := unsupported_fields(loaded.generation_config):
            print_note(f"note: generation_config.json: {', '.join(unused)} not used")
        longest = context_length(loaded)
        if context is not None and longest is not None and context > longest:
            raise ConfigError(f"--max-model-len {context}: the model was made for {longest} tokens")
        local, api_key = launch.is_local(sock), endpoint.api_key
        request_limits = Limits(context or longest or DEFAULT_CONTEXT, **limits.given())
        server = Server(
            loaded, tokenizer, endpoint.name, request_limits,
            engine=_choose_engine(loaded, tokenizer, request_limits),
            api_key=api_key, hosts=[endpoint.host, *LOCAL_NAMES] if local and not api_key else None,
        )  # fmt: skip
        print_note(f"note: {server.engine.description}")
        if not local and not api_key:
            print_note("note: everyone who reaches this address can use it: set --api-key")
        launch.run_server(
            server, sock, lambda: endpoint.announce("transformers", reason, sock.getsockname()[1])
        )
    print_note("stopped")


def _choose_engine(model: Any, tokenizer: Any, limits: Limits) -> Engine:
    """Returns the engine for several requests at the same time; if there is none, for one."""
    from roundwise.errors import ConfigError
    from roundwise.inference.serving.engines.engine import SingleEngine

    if limits.max_batch > 1:
        try:
            # transformers may move what this module needs: then it is one request at a time.
            from roundwise.inference.serving.engines.batching import BatchedEngine

            return BatchedEngine(
                model, tokenizer, max_batch=limits.max_batch, context=limits.context
            )
        except (ConfigError, ImportError) as error:
            print_note(f"note: {error}")
    return SingleEngine(model, tokenizer)
