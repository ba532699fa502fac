"""Peak memory while decoding the 1.1 B shape at 4 bits: lowbit above its import baseline, llama.cpp's resident set.

    lowbit quantize random-1b -o 1b-w4 --scheme w4a16-g128 --method rtn \\
        --override lm_head=w8a16-channel --override embed_tokens=w8a16-channel
    python benchmarks/decoder_memory.py --model 1b-w4 --bin BUILD/bin --gguf random-1b-q4_0.gguf

Prompt 128, answer 64, each in a process of its own, high-water mark of the resident set. The baseline is what Python,
torch and transformers' tokenizer take before a model is there; weights that llama.cpp maps count once they are read.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from lowbit.environment import environment

HERE = Path(__file__).resolve().parent
_OURS = """
import json, resource, sys, torch, transformers, psutil, lowbit
from lowbit.runtime.engine import load
baseline = psutil.Process().memory_info().rss
engine = load(sys.argv[1])
prompt = torch.randint(3, 4000, (1, 128), generator=torch.Generator().manual_seed(0))
tokens = len(list(engine.stream(prompt, 64)))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"runtime": engine.runtime, "tokens": tokens, "baseline": baseline, "peak": peak}))
"""


def peak_of(command: list[str]) -> int:
    """The high-water mark of a process's resident set, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed ({status})")
    return used.ru_maxrss * 1024


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--bin", type=Path, required=True)
    p.add_argument("--gguf", type=Path, required=True)
    p.add_argument("--output", type=Path, default=HERE / "results" / "decoder_memory.json")
    a = p.parse_args()
    run = subprocess.run([sys.executable, "-c", _OURS, a.model], capture_output=True, text=True, check=True)
    ours = json.loads(run.stdout.splitlines()[-1])
    words = ["-m", str(a.gguf), "-t", "2", "-r", "1", "-pg", "128,64", "-p", "0", "-n", "0"]
    theirs = peak_of([str(a.bin / "llama-bench"), *words])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "environment": environment(),
        "lowbit": ours | {"above_baseline": ours["peak"] - ours["baseline"]},
        "llama.cpp": {"file": a.gguf.name, "peak": theirs},
        "ratio": (ours["peak"] - ours["baseline"]) / theirs,
    }
    a.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in ("lowbit", "llama.cpp", "ratio")}, indent=1))


if __name__ == "__main__":
    main()
