"""The native decoder against llama.cpp, vLLM and transformers on a 1.1 B Llama shape and on the demo model, in turns.

    python benchmarks/compare_llamacpp.py --bin BUILD/bin --models DIR [--demo demo-q8_0.gguf] [--rounds 4]
        [--vllm VENV/bin/python --hf random-1b]

DIR holds random-1b-{q4_0,q4_k_m,q8_0,bf16}.gguf (benchmarks/peers/README.md says how they and the builds are made).
Every round runs each case once on every side, llama.cpp as `llama-bench` and `llama-batched-bench` start it and lowbit
in a process that keeps its weights; a ratio is the median over rounds of ours / theirs in the same round. The read
bandwidth is measured in every round beside the decoding it is compared with. Random weights: speed does not depend on
them. The head of lowbit's models is int8, one scale a row; activations are int8 in groups of 32.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# worker -> scheme of decoder_1b.py, cache type
WORKERS = {
    "w4": ("w4a16-g128", "fp16"),
    "w8": ("w8a16", "fp16"),
    "w8a8": ("w8a8", "fp16"),
    "w4-kv8": ("w4a16-g128", "int8"),
}


# ---- our side, in a process of its own ----


def serve(name: str) -> None:
    """Answer {"batch", "context", "prefill"} lines with {"tokens_per_s", "bytes_per_s", "peak"} lines."""
    answer = {"transformers": transformers_side, "demo": demo_side}.get(name, lambda: native_side(name))()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def native_side(name: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    from decoder_1b import make, measure, read_bandwidth

    scheme, kv = WORKERS[name]
    decoder = make(scheme, kv, 8 * 512 if name in ("w4", "w8") else 4352)

    def answer(request: dict[str, Any]) -> dict[str, float]:
        peak = read_bandwidth() if request.get("bandwidth") else 0.0
        steps = 2 if request["prefill"] else 40
        r = measure(decoder, request["context"], request["batch"], request["prefill"], 2, steps)
        rate = r["prefill_tokens_per_s"] if request["prefill"] else r["decode_tokens_per_s"]
        return {"tokens_per_s": rate, "bytes_per_s": r["bytes_per_s"], "peak": peak}

    return answer


def transformers_side() -> Callable[[dict[str, Any]], dict[str, float]]:
    import torch
    from decoder_1b import SHAPE
    from transformers import DynamicCache, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(SHAPE).eval()

    @torch.no_grad()
    def answer(request: dict[str, Any]) -> dict[str, float]:
        cache = DynamicCache()
        out = model(torch.randint(0, SHAPE.vocab_size, (1, request["context"])), past_key_values=cache)
        token, times = out.logits[:, -1:].argmax(-1), []
        for _ in range(9):
            start = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
        return {"tokens_per_s": 1 / statistics.median(times[1:]), "bytes_per_s": 0.0, "peak": 0.0}

    return answer


def demo_side() -> Callable[[dict[str, Any]], dict[str, float]]:
    import torch

    import lowbit

    with tempfile.TemporaryDirectory() as place:
        lowbit.quantize("demo", Path(place) / "q", scheme="w8a16-channel", method="rtn")
        engine = lowbit.load(Path(place) / "q")
        engine.generate("import", max_new_tokens=4)

    def answer(request: dict[str, Any]) -> dict[str, float]:
        prompt = torch.randint(3, 4096, (1, request["context"]))
        rates = []
        for _ in range(9):
            times = [time.perf_counter() for _ in engine.stream(prompt, 65)]
            rates.append(64 / (times[-1] - times[0]))
        return {"tokens_per_s": statistics.median(rates), "bytes_per_s": 0.0, "peak": 0.0}

    return answer


class Worker:
    """A model in its own process, which answers a line with a line. `pause`: stopped while nobody asks, for an engine
    whose threads spin while they wait."""

    def __init__(self, command: list[str], *, pause: bool = False) -> None:
        self.pause = pause
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE)
        assert self.process.stdout is not None
        while self.process.stdout.readline().strip() != "ready":
            if self.process.poll() is not None:
                sys.exit(f"{' '.join(command)} did not start")
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self.pause:
            self.process.send_signal(number)

    def ask(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"batch": 1, "context": 128, "prefill": 0} | request) + "\n")
        self.process.stdin.flush()
        reply: dict[str, float] = json.loads(self.process.stdout.readline())
        self._signal(signal.SIGSTOP)
        return reply


# ---- their side ----


def llama_bench(binary: Path, model: Path, *words: str) -> float:
    """Tokens a second of the one test that the words describe."""
    command = [str(binary / "llama-bench"), "-m", str(model), "-t", "2", "-r", "2", "-o", "json", *words]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout)[0]["avg_ts"])


def llama_batched(binary: Path, model: Path) -> float:
    """Generated tokens a second of eight sequences at a context of 128."""
    words = ["-c", "4096", "-t", "2", "-npp", "128", "-ntg", "32", "-npl", "8", "--output-format", "jsonl"]
    run = subprocess.run(
        [str(binary / "llama-batched-bench"), "-m", str(model), *words], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return float(rows[-1]["speed_tg"])


# ---- the comparison ----


def one_round(binary: Path, models: Path, demo: Path | None, ours: dict[str, Worker]) -> dict[str, float]:
    """Every case once, theirs and ours next to each other."""
    r: dict[str, float] = {}

    def theirs(case: str, file: str, *words: str) -> None:
        r[f"llama.cpp {file} {case}"] = llama_bench(binary, models / f"random-1b-{file}.gguf", *words)

    def mine(case: str, name: str, **request: Any) -> None:
        reply = ours[name].ask(**request)
        r[f"lowbit {name} {case}"] = reply["tokens_per_s"]
        if reply["peak"]:
            r[f"lowbit {name} {case} MBU"] = reply["bytes_per_s"] / reply["peak"]
            r["read GB/s"] = reply["peak"] / 1e9

    decode = ("-p", "0", "-n", "64", "-d", "128")
    for file, name in (("q4_0", "w4"), ("q4_k_m", "w4"), ("q8_0", "w8")):
        theirs("decode", file, *decode)
        mine("decode", name, bandwidth=True)
    for file, name in (("q4_0", "w4"), ("q8_0", "w8a8"), ("bf16", "w4"), ("q4_k_m", "w8a8")):
        theirs("prefill", file, "-p", "512", "-n", "0")
        mine("prefill", name, prefill=512)
    if "vllm" in ours:
        r["vllm bf16 prefill"] = ours["vllm"].ask(prefill=512)["tokens_per_s"]
    for file in ("q4_0", "q4_k_m"):
        r[f"llama.cpp {file} batch 8"] = llama_batched(binary, models / f"random-1b-{file}.gguf")
        mine("batch 8", "w4", batch=8)
    mine("context 4096", "w4", context=4000)
    mine("context 4096", "w4-kv8", context=4000)
    mine("decode", "transformers")
    if demo is not None:
        r["llama.cpp demo decode"] = llama_bench(binary, demo, *decode)
        mine("decode", "demo")
    return r


_PREFILL = [f"llama.cpp {file} prefill" for file in ("q4_0", "q4_k_m", "q8_0", "bf16")]
RATIOS = {  # name -> ours, theirs (the best of these)
    "decode, 4 bits": ("lowbit w4 decode", ["llama.cpp q4_0 decode", "llama.cpp q4_k_m decode"]),
    "decode, 8 bits": ("lowbit w8 decode", ["llama.cpp q8_0 decode"]),
    "prefill 512, 4 bits": ("lowbit w4 prefill", _PREFILL),
    "prefill 512, w8a8": ("lowbit w8a8 prefill", _PREFILL),
    "prefill 512, 4 bits / vLLM in bf16": ("lowbit w4 prefill", ["vllm bf16 prefill"]),
    "prefill 512, w8a8 / vLLM in bf16": ("lowbit w8a8 prefill", ["vllm bf16 prefill"]),
    "decode, batch 8, 4 bits": ("lowbit w4 batch 8", ["llama.cpp q4_0 batch 8", "llama.cpp q4_k_m batch 8"]),
    "decode at 4096, int8 cache / fp16 cache": ("lowbit w4-kv8 context 4096", ["lowbit w4 context 4096"]),
    "decode, 4 bits / bf16 through transformers": ("lowbit w4 decode", ["lowbit transformers decode"]),
    "demo decode, 8 bits": ("lowbit demo decode", ["llama.cpp demo decode"]),
}  # fmt: skip


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of everything, and of the ratios within rounds with their range."""
    ratios = {}
    for name, (mine, theirs) in RATIOS.items():
        if all(t in rounds[0] for t in theirs):
            values = [r[mine] / max(r[t] for t in theirs) for r in rounds]
            ratios[name] = {"median": statistics.median(values), "range": [min(values), max(values)]}
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    return {"ratios": ratios, "medians": medians}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bin", type=Path)
    p.add_argument("--models", type=Path)
    p.add_argument("--demo", type=Path)
    p.add_argument("--vllm", help="python of an environment with vLLM's CPU build")
    p.add_argument("--hf", help="the same model as a Hugging Face directory, for vLLM")
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--serve", help=argparse.SUPPRESS)
    p.add_argument("--output", type=Path, default=HERE / "results" / "decoder.json")
    a = p.parse_args()
    if a.serve:
        return serve(a.serve)
    from lowbit.environment import environment

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    sides = [*WORKERS, "transformers", *(["demo"] if a.demo else [])]
    ours = {name: Worker([sys.executable, __file__, "--serve", name]) for name in sides}
    if a.vllm:
        ours["vllm"] = Worker([a.vllm, str(HERE / "peers" / "run_vllm.py"), a.hf], pause=True)
    rounds = []
    for i in range(a.rounds):
        rounds.append(one_round(a.bin, a.models, a.demo, ours))
        print(f"round {i + 1}:", json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    for worker in ours.values():
        worker.process.kill()
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "environment": environment(),
        **summary(rounds),
        "rounds": rounds,
    }
    a.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["ratios"], indent=1))
    return None


if __name__ == "__main__":
    main()
