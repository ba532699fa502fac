"""lowbit serve"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Kv, Program, Quiet, Runtime, Verbose, begin, check_runtime
from lowbit.console import note
from lowbit.errors import InputError

KEY = "LOWBIT_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    path: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, hub id or 'demo'; or what `lowbit tune` made.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's want an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model (default: its directory's name).")] = (
        None
    ),
    cache_tokens: Annotated[int, typer.Option(min=1, help="Size of the key-value cache for all requests.")] = 16384,
    max_running: Annotated[int, typer.Option(min=1, help="The most requests answered at once.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=1, help="The most requests answered and waiting.")] = 256,
    runtime: Runtime = "auto",
    program: Program = None,
    kv: Kv = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer requests over HTTP, as OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models.

    Of what `lowbit tune` made, the recommended model is served, and its report at /: what readers choose there is kept
    in selections.jsonl. An API key is taken from the environment variable LOWBIT_API_KEY.
    """
    begin(quiet, verbose)
    kind = check_runtime(runtime)
    key = os.environ.get(KEY) or None
    if host not in LOCAL and key is None:
        raise InputError(f"--host {host} is open to others: set an API key first, in the environment as {KEY}.")
    import uvicorn

    from lowbit.runtime.engine import load
    from lowbit.runtime.server import Serving
    from lowbit.serving.app import Service, make_app
    from lowbit.serving.listen import listening
    from lowbit.serving.tuned import page_of, recommended
    from lowbit.serving.worker import Worker

    directory = Path(path)
    tuned = (directory / "tune.json").exists()
    model = recommended(directory) if tuned else path
    page = page_of(directory) if tuned else None
    with listening(host, port) as socket, load(model, kind, Serving(program=program), kv=kv) as engine:
        worker = Worker(engine, most=max_waiting, cache_tokens=cache_tokens, max_running=max_running)
        service = Service(worker, name or Path(model).name, LOCAL if host in LOCAL else None, key, page)
        address = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}"
        note(f"{service.name} on {engine.runtime}: {address}/v1 (Ctrl-C ends)")
        if page is not None:
            note(f"the report of tune: {address}/")
        config = uvicorn.Config(make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        try:
            uvicorn.Server(config).run(sockets=[socket])
        finally:
            worker.stop()
    if worker.failure is not None:
        print(f"lowbit: the model failed: {worker.failure}", file=sys.stderr)
        raise typer.Exit(1)
