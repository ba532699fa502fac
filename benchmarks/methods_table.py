"""Every method by every kind of scheme on the demo model: KL, perplexity, bits per weight, seconds, peak memory.

    python benchmarks/methods_table.py [--only w4a16:gptq] [--model demo]

Each is quantized in a process of its own with the defaults (128 x 512 calibration tokens of the demo's text) and
evaluated on the demo's evaluation text in windows of 512: weights dequantized, float32, activations as the scheme says,
so that it is the method that is measured and not a kernel. Results go to results/methods.json, the table between the
markers of docs/methods.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results" / "methods.json", ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- methods: begin -->\n", "<!-- methods: end -->\n"
# scheme, method, settings
CASES = [
    ("w8a8", "rtn", ""), ("w8a8", "smoothquant+gptq", ""), ("fp8", "rtn", ""), ("fp8", "gptq", ""),
    ("w4a16", "rtn", ""), ("w4a16", "gptq", ""), ("w4a16", "awq", ""), ("w4a16", "awq+gptq", ""),
    ("w4a16", "gptq", "follow_original=true"), ("w4a16", "hadamard+gptq", ""),
    ("any4", "gptq", ""), ("nf4", "gptq", ""), ("nvfp4", "gptq", ""), ("mxfp4", "gptq", ""),
    ("w3a16", "gptq", ""), ("w3a16", "gptq", "follow_original=true"), ("e8p3", "quip", ""),
    ("w2a16", "gptq", ""), ("w2a16-midrise", "gptq", "follow_original=true"), ("e8p2", "quip", ""),
]  # fmt: skip
PEERS = [  # as benchmarks/peers measures them: what, perplexity, KL
    ("llm-compressor GPTQ w4", "12.902", "0.00411"), ("GPTQModel w4", "12.911", "0.00458"),
    ("AutoRound w4", "12.901", "0.00361"), ("llm-compressor AWQ w4 (asymmetric)", "12.986", "0.00940"),
    ("llm-compressor GPTQ w3", "13.146", "0.01963"), ("AutoRound w3", "13.047", "0.01383"),
    ("llm-compressor GPTQ w2", "14.703", "0.12561"), ("AutoRound w2", "13.771", "0.06493"),
    ("llm-compressor W8A8 SmoothQuant+GPTQ", "12.861", "0.00040"), ("llm-compressor FP8 dynamic", "12.881", "0.00209"),
]  # fmt: skip
_RUN = """
import json, sys
import lowbit
scheme, method, settings, model, out = sys.argv[1:]
words = dict(pair.split("=") for pair in settings.split(",") if pair)
d = lowbit.quantize(model, out, scheme=scheme, method=method, set=tuple(words.items()), calibration=None)
e = lowbit.evaluate([out], against=model, seq_len=512, runtime="float32")["results"][0]
print(json.dumps({"bits_per_weight": d["bits_per_weight"], "seconds": d["seconds"], "peak_memory_bytes":
                  d["peak_memory_bytes"], "perplexity": e["perplexity"], "kl": e["kl"],
                  "fallbacks": sum(r["fallback"] is not None for r in d["layers"])}))
"""


def measure(scheme: str, method: str, settings: str, model: str) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-c", _RUN, scheme, method, settings, model, str(Path(place) / "q")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"scheme": scheme, "method": method, "set": settings, "error": run.stderr.strip().splitlines()[-1]}
    return {"scheme": scheme, "method": method, "set": settings} | json.loads(run.stdout.strip().splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of results.json's rows."""
    lines = [
        "| scheme | method | bits per weight | perplexity | KL | seconds | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        how = f"`{r['method']}`" + (f" `--set {r['set']}`" if r["set"] else "")
        kl = f"{r['kl']['mean']:.5f} ± {r['kl']['stderr']:.5f}"
        memory = f"{r['peak_memory_bytes'] / 1e9:.2f} GB"
        lines.append(
            f"| `{r['scheme']}` | {how} | {r['bits_per_weight']:.3f} | {r['perplexity']:.3f} | {kl} "
            f"| {r['seconds']:.0f} | {memory} |"
        )
    lines += ["", "| peer | perplexity | KL |", "|---|---|---|"]
    lines += [f"| {name} | {perplexity} | {kl} |" for name, perplexity, kl in PEERS]
    return "\n".join(lines) + "\n"


def write_docs(rows: list[dict[str, Any]]) -> None:
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    DOCS.write_text(before + BEGIN + table(rows) + END + rest.split(END)[1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--only", help="SCHEME:METHOD; the other rows stay as they are")
    a = p.parse_args()
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {(r["scheme"], r["method"], r["set"]): r for r in old}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    for case in CASES:
        if a.only in (None, f"{case[0]}:{case[1]}"):
            row = measure(*case, a.model)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if "error" not in row:
                rows[case] = row | {"commit": commit.stdout.strip()}
            ordered = [rows[c] for c in CASES if c in rows]
            document = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "environment": environment(),
                "rows": ordered,
            }
            RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    write_docs([rows[c] for c in CASES if c in rows])


if __name__ == "__main__":
    main()
