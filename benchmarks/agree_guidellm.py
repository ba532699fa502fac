"""`lowbit bench URL` against GuideLLM on the same server: do two load generators see the same server?

Rounds of both tools in turns, closed loop, equally many requests of equal length at the same concurrency, prompts that
share nothing between runs, so that no cache of the server helps the second. What is compared: time to first token, the
mean gap between tokens (lowbit's TPOT, GuideLLM's inter-token latency) and generated tokens a second. The difference of
the tools stands beside the spread of each tool's own rounds, which is the noise.

A load generator computes too: one that shares its cores with the server slows the server down, and GuideLLM's several
processes more than lowbit's one. So the server has cores of its own, and both tools have the others. Without a URL the
server is agree_server.py on the first core; one that is started by hand is kept to some cores by `taskset`.

Every round is written as it ends, and an interrupted script goes on with the next. About ten minutes on two cores.

    python benchmarks/agree_guidellm.py --guidellm PATH/guidellm
    taskset -c 0 llama-server -m MODEL.gguf --port 8099 --no-cache-prompt -np 2 -t 1 &
    python benchmarks/agree_guidellm.py http://127.0.0.1:8099 --guidellm PATH/guidellm --tokenizer MODEL_DIRECTORY
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from partial import RESULTS, known, save

from lowbit.intervals import median_interval
from lowbit.model.checkpoint import DEMO
from lowbit.speed import Load, bench

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
FIGURES = ("ttft_s", "tpot_s", "tokens_per_s")


@contextmanager
def served() -> Iterator[str]:
    """The URL of agree_server.py, on the first core that this process may use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    core = {min(os.sched_getaffinity(0))}
    command = [sys.executable, str(Path(__file__).with_name("agree_server.py")), str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, core),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        if "ready\n" not in (server.stdout or ()):
            raise SystemExit("the server ended before it was ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def by_lowbit(url: str, a: argparse.Namespace, seed: int) -> dict[str, float]:
    shape: dict[str, Any] = {
        "prompt_lengths": [a.prompt], "output_lengths": [a.answer], "batch_sizes": [a.concurrency]
    }  # fmt: skip
    (row,) = bench([url], **shape, load=Load(requests=a.requests), seed=seed)["results"]
    found = {"ttft_s": row["ttft_s"]["median"], "tpot_s": row["tpot_s"]["median"]}
    return found | {"tokens_per_s": row["throughput_tokens_per_s"]}


def by_guidellm(url: str, a: argparse.Namespace, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place:
        data, report = Path(place) / "prompts.json", Path(place) / "report.json"
        prompts = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), a.prompt)) for _ in range(a.requests)]
        rows = [{"prompt": p, "prompt_tokens_count": a.prompt, "output_tokens_count": a.answer} for p in prompts]
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        command = [
            a.guidellm, "run", "--backend", f"kind=openai_http,target={url},request_format=/v1/completions",
            "--profile", f"kind=concurrent,streams={a.concurrency}", "--data", f"kind=json_file,path={data}",
            "--constraint", f"kind=max_requests,count={a.requests}", "--tokenizer", f"kind=hf_auto,model={a.tokenizer}",
            "--output", f"kind=json,path={report}", "--disable-console",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.exists():
            raise SystemExit(f"GuideLLM wrote no report:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]

    def median(name: str) -> float:
        return float(metrics[name]["successful"]["median"])

    return {
        "ttft_s": median("time_to_first_token_ms") / 1e3,
        "tpot_s": median("inter_token_latency_ms") / 1e3,
        "tokens_per_s": float(metrics["output_tokens_per_second"]["successful"]["mean"]),
    }


def compare(own: list[Mapping[str, float]], other: list[Mapping[str, float]], figure: str) -> dict[str, Any]:
    """Medians of both, the ratio round by round with its interval, and how far a tool's own rounds are apart."""
    a, b = (np.array([r[figure] for r in rounds]) for rounds in (own, other))
    spread = max(float(np.ptp(x) / np.median(x)) for x in (a, b))
    ratio = median_interval(a / b)
    within = ratio.low <= 1 <= ratio.high or abs(ratio.estimate - 1) <= spread
    medians = {"lowbit": statistics.median(a), "guidellm": statistics.median(b)}
    return medians | {"ratio": ratio.to_dict(), "own_spread": spread, "within_noise": bool(within)}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("url", nargs="?", help="default: agree_server.py, started on the first core")
    p.add_argument("--guidellm", default="guidellm")
    p.add_argument("--tokenizer", default=str(DEMO / "model"))
    for name, value in (("rounds", 6), ("requests", 32), ("concurrency", 2), ("prompt", 64), ("answer", 48)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--output", "--json", dest="file", type=Path, default=RESULTS / "agreement.json")
    return p.parse_args()


def take_turns(url: str, a: argparse.Namespace, settings: dict[str, Any]) -> dict[str, list[Mapping[str, float]]]:
    """The rounds of both tools, the first to warm up."""
    runs: dict[str, list[Mapping[str, float]]] = known(a.file, settings).get("runs", {"lowbit": [], "guidellm": []})
    for r in range(len(runs["lowbit"]), a.rounds + 1):
        found = {"lowbit": by_lowbit(url, a, 2 * r), "guidellm": by_guidellm(url, a, 2 * r + 1001)}
        for tool, figures in found.items():
            print(r, tool, {k: round(v, 5) for k, v in figures.items()}, flush=True)
            runs[tool].append(figures)
        save(a.file, settings, {"runs": runs}, finished=False)
    return runs


def main() -> None:
    a = arguments()
    settings = {k: getattr(a, k) for k in ("rounds", "requests", "concurrency", "prompt", "answer")}
    settings["server"] = a.url or "agree_server.py"
    if a.url:
        runs = take_turns(a.url, a, settings)
    else:
        with served() as url:
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, cores - {min(cores)} or cores)  # the tools' own, GuideLLM's processes included
            runs = take_turns(url, a, settings)
    counted = {tool: rounds[1:] for tool, rounds in runs.items()}
    figures = {f: compare(counted["lowbit"], counted["guidellm"], f) for f in FIGURES}
    for name, c in figures.items():
        i = c["ratio"]
        print(f"{name:13} lowbit {c['lowbit']:.5g}  GuideLLM {c['guidellm']:.5g}  ratio {i['estimate']:.3f} "
              f"({i['low']:.3f} to {i['high']:.3f}), a tool's own rounds differ by {c['own_spread']:.1%}: "
              f"{'within' if c['within_noise'] else 'OUTSIDE'} the noise")  # fmt: skip
    save(a.file, settings, {"figures": figures, "runs": counted}, finished=True)


if __name__ == "__main__":
    main()
