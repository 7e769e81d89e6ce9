"""`roundwise serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from roundwise.cli.progress import JsonOption, console, print_json


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: folder or hub id.")],
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments for vLLM, passed through.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto (vLLM where it is installed and can), vllm or transformers.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model (default: as MODEL ends).")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ROUNDWISE_API_KEY", help="Key that clients must send."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, instead of the model's own template.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda (transformers).")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(help="GPUs to split it over (vLLM).", min=1)] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer (default: the model's).", min=2)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one answer (transformers).", min=1)
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Running and waiting at once; 32 (transformers).", min=1)
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Of a request; 2000000 (transformers).", min=1)
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for a request; 600 (transformers).", min=0.1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a model over HTTP with OpenAI's API, on this machine only unless told otherwise."""
    import torch

    from roundwise.checkpoint.hub import local_folder
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.errors import ConfigError
    from roundwise.inference.load import parse_dtype
    from roundwise.inference.serving import launch, vllm

    parse_dtype(dtype)  # refuses other names
    folder = local_folder(model)
    checkpoint = Checkpoint(folder)
    name = name or Path(model).resolve().name if Path(model).exists() else name or model
    limits = {"max_tokens": max_tokens, "max_requests": max_requests, "max_bytes": max_bytes,
              "timeout": timeout}  # fmt: skip
    limits = {key: value for key, value in limits.items() if value is not None}
    found, why = launch.choose(
        backend, checkpoint.config, dtype=dtype, gpu=torch.cuda.is_available()
    )
    if found is not None:
        if limits:
            raise ConfigError(
                f"--{next(iter(limits)).replace('_', '-')} is for the transformers backend: use "
                "--backend transformers, or vLLM's own arguments after --"
            )
        options = vllm.VllmOptions(
            name, host, port, dtype, max_model_len, tensor_parallel, chat_template,
            tuple(extra or ()),
        )  # fmt: skip
        _announce(as_json, "vllm", why, name, host, port)
        if api_key:
            os.environ["VLLM_API_KEY"] = api_key
        line = vllm.arguments(found, folder, options)
        os.execv(line[0], line)  # noqa: S606  # no shell: vLLM takes this process's place
    if extra or tensor_parallel > 1:
        raise ConfigError(
            f"{' '.join(extra) if extra else '--tensor-parallel'} is for vLLM, and the backend is "
            f"transformers ({why})"
        )
    _serve_here(
        folder, name, why, as_json=as_json, host=host, port=port, api_key=api_key, dtype=dtype,
        device=device, chat_template=chat_template, context=max_model_len, limits=limits,
    )  # fmt: skip


def _serve_here(
    folder: Path,
    name: str,
    why: str,
    *,
    as_json: bool,
    host: str,
    port: int,
    api_key: str | None,
    dtype: str,
    device: str,
    chat_template: Path | None,
    context: int | None,
    limits: dict[str, Any],
) -> None:
    """Loads the model and serves it in this process."""
    from roundwise.inference.serving import launch

    launch.check_installed()

    from roundwise.errors import CheckpointError, ConfigError
    from roundwise.inference.load import load, parse_dtype
    from roundwise.inference.prompts import read_chat_template
    from roundwise.inference.serving.app import LOCAL_NAMES, Limits, Server
    from roundwise.system.device import parse_device

    with launch.bound_socket(host, port) as sock:
        loaded, tokenizer = load(folder, dtype=parse_dtype(dtype), device=parse_device(device))
        if tokenizer is None:
            raise CheckpointError(f"{folder} has no tokenizer")
        if chat_template is not None:
            read_chat_template(tokenizer, chat_template)
        own = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and own is not None and context > own:
            raise ConfigError(f"--max-model-len {context}: the model was made for {own} tokens")
        local = launch.is_local(sock)
        server = Server(
            loaded, tokenizer, name, Limits(context or own or 2048, **limits), api_key=api_key,
            hosts=[host, *LOCAL_NAMES] if local and not api_key else None,
        )  # fmt: skip
        if not local and not api_key:
            console.print("note: everyone who reaches this address can use it: set --api-key")
        sock.listen(128)
        _announce(as_json, "transformers", why, name, host, sock.getsockname()[1])
        launch.run(server.app, sock)
    console.print("stopped")


def _announce(as_json: bool, backend: str, why: str, name: str, host: str, port: int) -> None:
    """Says where it is; at once, also into a pipe, because the command stays."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if as_json:
        print_json({"url": url, "model": name, "backend": backend, "reason": why})
        sys.stdout.flush()
    console.print(
        f"serving {name} on {url} with {backend} ({why})", highlight=False, soft_wrap=True,
        markup=False,
    )  # fmt: skip
