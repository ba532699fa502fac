"""Memory and time on a model of 1.1 billion parameters: lowbit's GPTQ against llm-compressor's, in alternating runs.

    python benchmarks/compare_large.py --llmcompressor VENV/bin/python --model DIR [--samples 32] [--rounds 1]

The model is a Llama shape (2048 hidden, 16 layers) with random bfloat16 weights, made at --model if nothing is there;
both tools get the same windows of the demo's calibration text, and both write what vLLM would load. Each run is a
process of its own, watched from outside (lowbit's with this script's Python: run it with that of an environment as a
user installs it, `pip install psutil lowbit`, since development tools are mapped into memory as well):

    peak_pss      the largest sum, over the process and its children, of proportional set sizes (shared pages once;
                  a sample in whose middle a child began or ended is none, since it counts shared pages twice)
    peak_private  of that, what is no file: files that are mapped (safetensors, libraries) are the system's to drop
    peak_rss      the sum of the processes' own high-water marks, which no sampling can miss
    wall_seconds  from start to end, with imports
    predicted     what `lowbit quantize --dry-run` said before of its own `seconds` and `peak_memory_bytes`
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from lowbit.workers import default_workers

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "src/lowbit/demo"
WINDOW = 512
POLL_SECONDS = 0.1


SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip


def make_model(path: Path, **shape: int) -> None:
    """A random bfloat16 Llama (1.1 billion parameters, or of another shape) with the demo's tokenizer, in a process
    of its own, so that this one's memory and torch's settings stay as they are."""
    code = (
        "import json, sys, torch; from transformers import LlamaConfig, LlamaForCausalLM; torch.manual_seed(0); "
        "torch.set_default_dtype(torch.bfloat16); "
        "LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2]))).save_pretrained(sys.argv[1], max_shard_size='500MB')"
    )
    subprocess.run([sys.executable, "-c", code, str(path), json.dumps(SHAPE | shape)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, path / name)


def memory_of(root: psutil.Process) -> tuple[int, int, dict[int, int]]:
    """(PSS, the part of it that is no file, high-water mark by process id) of a process and its children, in bytes."""
    pss = private = 0
    marks: dict[int, int] = {}
    children = root.children(recursive=True)
    for process in [root, *children]:
        folder = Path(f"/proc/{process.pid}")
        try:
            rollup = (folder / "smaps_rollup").read_text()
            status = (folder / "status").read_text()
        except OSError:
            continue  # it has ended
        kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
        pss += kib.get("Pss", 0) * 1024
        private += (kib.get("Pss_Anon", 0) + kib.get("Pss_Shmem", 0)) * 1024
        mark = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
        marks[process.pid] = int(mark.split()[1]) * 1024
    whole = root.children(recursive=True) == children
    return (pss, private, marks) if whole else (0, 0, marks)


def watched(command: list[str], **variables: str) -> tuple[dict[str, Any], str]:
    """Run a command to its end: (what it took, its standard output). Leaves the program if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, env=os.environ | variables)
        root, pss, private = psutil.Process(process.pid), 0, 0
        marks: dict[int, int] = {}
        while process.poll() is None:
            try:
                now = memory_of(root)
            except psutil.NoSuchProcess:
                break
            pss, private = max(pss, now[0]), max(private, now[1])
            marks |= {pid: max(mark, marks.get(pid, 0)) for pid, mark in now[2].items()}  # one that has ended says 0
            time.sleep(POLL_SECONDS)
        process.wait()
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed ({process.returncode}):\n{errors.read()[-3000:]}")
        taken = {
            "wall_seconds": round(seconds, 1),
            "peak_pss": pss,
            "peak_private": private,
            "peak_rss": sum(marks.values()),
            "processes": len(marks),
            "load_after": round(os.getloadavg()[0], 2),
        }
        return taken, output.read()


def run_lowbit(model: Path, out: Path, samples: int, workers: int, settings: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "lowbit", "quantize", str(model), "-o", str(out), "--scheme", "w4a16-g128"]
    command += ["--method", "gptq", "--calibration", str(DEMO / "calibration.txt"), "--samples", str(samples)]
    command += ["--seq-len", str(WINDOW), "--workers", str(workers), "--quiet", "--force", "--json", "-"]
    command += [word for setting in settings for word in ("--set", setting)]
    predicted = json.loads(watched([*command, "--dry-run"])[1])["predicted"]
    taken, output = watched(command)
    document = json.loads(output)
    loss = sum(r["loss"] for r in document["layers"]) / sum(r["loss_rtn"] for r in document["layers"])
    return {
        "tool": "lowbit",
        "workers": workers,
        "set": settings,
        "seconds": round(document["seconds"], 1),
        "peak_memory_bytes": document["peak_memory_bytes"],
        "predicted": {key: predicted[key] for key in ("seconds", "peak_memory_bytes")},
        "threads": document["environment"]["threads"],
        "loss_over_rtn": loss,
        "fallbacks": sum(r["fallback"] is not None for r in document["layers"]),
    } | taken


def run_llmcompressor(python: str, model: Path, out: Path, samples: int) -> dict[str, Any]:
    command = [python, str(HERE / "peers/large_llmcompressor.py"), str(samples), str(out)]
    taken, output = watched(command, MODEL=str(model), CALIBRATION=str(DEMO / "calibration.txt"))
    row: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return row | taken


def best(rows: list[dict[str, Any]], tool: str, key: str) -> float:
    return min(float(r[key]) for r in rows if r["tool"] == tool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", help="its virtual environment's python; without it only lowbit runs")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=default_workers(), help="lowbit's, as many as by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lowbit's, such as sweeps=0")
    parser.add_argument("--append", action="store_true", help="to the runs of an earlier call, in --output")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "large.json")
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        make_model(args.model)

    from lowbit.environment import environment

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    rows: list[dict[str, Any]] = json.loads(args.output.read_text())["runs"] if args.append else []
    document: dict[str, Any] = {
        "environment": environment(),
        "samples": args.samples,
        "window": WINDOW,
        "runs": rows,
    }

    def keep(row: dict[str, Any]) -> None:
        """A run takes up to an hour: what is measured is on disk before the next one begins."""
        when = {"commit": commit.stdout.strip(), "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        rows.append(row | when)
        if {"lowbit", "llmcompressor"} <= {r["tool"] for r in rows}:
            document["lowbit_over_llmcompressor"] = {
                key: best(rows, "lowbit", key) / best(rows, "llmcompressor", key)
                for key in ("wall_seconds", "peak_pss", "peak_private", "peak_rss")
            }
        args.output.write_text(json.dumps(document, indent=2) + "\n")
        print(json.dumps(row), flush=True)

    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
            keep(run_lowbit(args.model, Path(folder) / "lowbit", args.samples, args.workers, args.set))
            if args.llmcompressor:
                keep(run_llmcompressor(args.llmcompressor, args.model, Path(folder) / "peer", args.samples))


if __name__ == "__main__":
    main()
