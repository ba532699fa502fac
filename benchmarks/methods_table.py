"""Every method by every kind of scheme: KL, perplexity, bits per weight, seconds, peak memory, beside the peers'.

    python benchmarks/methods_table.py [--outlier DIRECTORY] [--only demo:w4a16:gptq ...] [--again]

Each is quantized in a process of its own with the defaults (128 x 512 calibration tokens of the demo's text) and
evaluated on --windows windows of 512 tokens, spread over the demo's evaluation text: weights dequantized, float32,
activations as the scheme says, so that it is the method that is measured and not a kernel. --outlier is a directory
with the demo model's function and large activations in a few channels; without it its rows are left as they are.

Rows go to results/methods.json as soon as they are measured (--together of them at a time), and the table between the
markers of docs/methods.md is made anew. Rows that are there already are skipped, so an interrupted run goes on where it
was; --again measures them again, --render only makes the table.
"""

import argparse
import fnmatch
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
TEXTS = ROOT / "src" / "lowbit" / "demo"
BEGIN, END = "<!-- methods: begin -->\n", "<!-- methods: end -->\n"
DEMO, OUTLIER = "demo", "outlier"
FOLLOW = "follow_original=true"
# model -> scheme -> (method, settings)
CASES: dict[str, dict[str, list[tuple[str, str]]]] = {
    DEMO: {
        "w8a8": [("rtn", ""), ("gptq", ""), ("smoothquant", ""), ("smoothquant+gptq", "")],
        "w8a8-bmm": [("smoothquant+gptq", "")],
        "w8a8-static": [("smoothquant+gptq", "")],
        "fp8": [("rtn", ""), ("gptq", ""), ("smoothquant+gptq", "")],
        "fp8-block": [("gptq", "")],
        "fp8-static": [("gptq", "")],
        "w4a8": [("awq+gptq", "")],
        "w4afp8": [("awq+gptq", "")],
        "w4a16": [
            ("rtn", ""), ("awq", ""), ("gptq", ""), ("gptq", FOLLOW), ("awq+gptq", ""), ("hadamard+gptq", ""),
            ("quip", ""), ("signround", ""), ("awq+signround", ""), ("signround", "scope=model"),
        ],
        "w4a16-asym": [("awq", ""), ("gptq", "")],
        "any4": [("rtn", ""), ("any4", ""), ("gptq", ""), ("signround", "scope=model")],
        "nf4": [("rtn", ""), ("gptq", "")],
        "nvfp4": [("rtn", ""), ("gptq", "")],
        "mxfp4": [("rtn", ""), ("gptq", "")],
        "e8p4": [("quip", "")],
        "w3a16": [
            ("rtn", ""), ("awq", ""), ("gptq", ""), ("gptq", FOLLOW), ("awq+gptq", ""), ("hadamard+gptq", ""),
            ("quip", ""), ("signround", ""), ("signround", "scope=model"),
        ],
        "any3": [("any4", ""), ("gptq", "")],
        "e8p3": [("quip", "")],
        "w2a16": [("gptq", ""), ("gptq", FOLLOW), ("quip", "")],
        "w2a16-midrise": [
            ("gptq", ""), ("gptq", f"{FOLLOW},sweeps=6"), ("signround", ""), ("signround", "scope=model"),
        ],
        "any2": [("any4", ""), ("gptq", "")],
        "e8p2": [("quip", "")],
    },
    OUTLIER: {
        "w8a8": [("rtn", ""), ("smoothquant", ""), ("smoothquant+gptq", "")],
        "fp8": [("rtn", "")],
        "w4a16": [("rtn", ""), ("gptq", ""), ("awq", ""), ("awq+gptq", ""), ("signround", "scope=model")],
    },
}  # fmt: skip
# as benchmarks/peers measures them on the whole text: model -> what, bits per weight, perplexity, KL, seconds and peak
# memory (of the process with its evaluation) on two Zen 5 cores, where they were taken
PEERS_ORIGINAL = 12.856
PEERS = {
    DEMO: [
        ("llm-compressor SmoothQuant+GPTQ W8A8", "8.052", "12.861", "0.00040", "43", "1.56 GB"),
        ("llm-compressor FP8 dynamic", "8.052", "12.881", "0.00209", "0.1", "1.07 GB"),
        ("AutoRound w4, 200 iterations", "4.125", "12.901", "0.00361", "154", "1.33 GB"),
        ("llm-compressor GPTQ w4", "4.125", "12.902", "0.00411", "25", "1.13 GB"),
        ("GPTQModel GPTQ w4", "4.125", "12.911", "0.00458", "34", "1.86 GB"),
        ("llm-compressor AWQ w4, zero points", "4.156", "12.986", "0.00940", "190", "2.57 GB"),
        ("AutoRound w3", "3.125", "13.047", "0.01383", "164", "1.34 GB"),
        ("llm-compressor GPTQ w3", "3.125", "13.146", "0.01963", "24", "1.20 GB"),
        ("GPTQModel GPTQ w3", "3.125", "13.150", "0.02115", "18", "1.76 GB"),
        ("AutoRound w2", "2.125", "13.771", "0.06493", "154", "1.33 GB"),
        ("llm-compressor GPTQ w2", "2.125", "14.703", "0.12561", "25", "1.38 GB"),
    ],
    OUTLIER: [
        ("llm-compressor SmoothQuant+GPTQ W8A8", "8.052", "13.144", "0.01982", "", ""),
        ("llm-compressor RTN W8A8", "8.052", "14.854", "0.14044", "", ""),
        ("llm-compressor FP8 dynamic", "8.052", "12.886", "0.00223", "", ""),
        ("llm-compressor AWQ w4, zero points", "4.156", "12.989", "0.00942", "", ""),
        ("llm-compressor GPTQ w4", "4.125", "12.986", "0.01024", "", ""),
    ],
}
_QUANTIZE = """
import json, sys
import lowbit
scheme, method, settings, model, out, calibration = sys.argv[1:]
words = dict(pair.split("=") for pair in settings.split(",") if pair)
d = lowbit.quantize(model, out, scheme=scheme, method=method, set=tuple(words.items()), calibration=calibration)
print(json.dumps({key: d[key] for key in ("bits_per_weight", "seconds", "peak_memory_bytes")} |
                 {"fallbacks": sum(r["fallback"] is not None for r in d["layers"])}))
"""
_EVALUATE = """
import json, sys
import lowbit
model, evaluation, windows, *outs = sys.argv[1:]
words = {"seq_len": 512, "windows": int(windows) or None, "runtime": "float32"}
document = lowbit.evaluate(outs, evaluation, against=model, **words)
original = document["reference"]["perplexity"]
print(json.dumps([{"perplexity": e["perplexity"], "original_perplexity": original, "kl": e["kl"]}
                  for e in document["results"]]))
"""
Case = tuple[str, str, str, str]  # model, scheme, method, settings


def every_case() -> list[Case]:
    return [
        (m, s, method, kind) for m, schemes in CASES.items() for s, rows in schemes.items() for method, kind in rows
    ]


def measure(cases: list[Case], path: str, windows: int, *, untimed: bool) -> list[dict[str, Any]]:
    """Rows of one model's cases; `path` is where it is. Evaluated together, so that the original is only run once."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        outs = []
        for i, (model, scheme, method, settings) in enumerate(cases):
            row = {"model": model, "scheme": scheme, "method": method, "set": settings}
            out = str(Path(place) / str(i))
            made = _last_line(_QUANTIZE, scheme, method, settings, path, out, str(TEXTS / "calibration.txt"))
            print(json.dumps(row | made), file=sys.stderr, flush=True)
            if "error" not in made:
                rows.append(row | made | ({"seconds": None} if untimed else {}))
                outs.append(out)
        judged = _last_line(_EVALUATE, path, str(TEXTS / "evaluation.txt"), str(windows), *outs) if outs else []
        if isinstance(judged, dict):
            sys.exit(judged["error"])
    return [row | {"windows": windows} | result for row, result in zip(rows, judged, strict=True)]


def _last_line(code: str, *words: str) -> Any:
    """What a process printed last, as JSON, or {"error": its last word}."""
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if run.returncode:
        return {"error": run.stderr.strip().splitlines()[-1]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def key(row: dict[str, Any]) -> Case:
    return row["model"], row["scheme"], row["method"], row["set"]


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown tables of results/methods.json's rows, one a model, each with its peers' rows below."""
    lines = []
    for model, name in ((DEMO, "The demo model"), (OUTLIER, "The same function with activation outliers")):
        lines += [
            f"**{name}**", "",
            "| scheme | method | bits per weight | perplexity increase | KL | seconds | peak memory |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_line(r) for r in rows if r["model"] == model]
        lines += [
            f"| peer | {what} | {bits} | {float(ppl) / PEERS_ORIGINAL - 1:+.2%} | {kl} | {seconds} | {memory} |"
            for what, bits, ppl, kl, seconds, memory in PEERS[model]
        ]
        lines.append("")
    return "\n".join(lines)


def _line(r: dict[str, Any]) -> str:
    how = f"`{r['method']}`" + (f" `--set {' --set '.join(r['set'].split(','))}`" if r["set"] else "")
    kl = f"{r['kl']['mean']:.5f} ± {r['kl']['stderr']:.5f}"
    seconds = "" if r["seconds"] is None else f"{r['seconds']:.0f}"
    increase = r["perplexity"] / r["original_perplexity"] - 1
    return (
        f"| `{r['scheme']}` | {how} | {r['bits_per_weight']:.3f} | {increase:+.2%} | {kl} | {seconds} "
        f"| {r['peak_memory_bytes'] / 1e9:.2f} GB |"
    )


def wanted(case: Case, globs: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(":".join(case), glob + "*") for glob in globs)


def read_rows() -> list[dict[str, Any]]:
    """The rows measured so far, in the order of CASES."""
    stored = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {key(r): r for r in stored}
    return [rows[case] for case in every_case() if case in rows]


def write(rows: list[dict[str, Any]]) -> None:
    document = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def render() -> None:
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(before + BEGIN + table(read_rows()) + END + rest.split(END)[1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--outlier", help="directory of the model with activation outliers")
    p.add_argument(
        "--only", nargs="+", default=["*"], help="globs of MODEL:SCHEME:METHOD:SETTINGS or of any beginning of it"
    )
    p.add_argument("--again", action="store_true", help="measure rows that are there already")
    p.add_argument("--untimed", action="store_true", help="leave the seconds out: the machine is busy")
    p.add_argument("--together", type=int, default=6, help="so many are evaluated in one pass over the text")
    p.add_argument("--windows", type=int, default=112, help="of 512 tokens, spread over the text; 0: all 336")
    p.add_argument("--render", action="store_true", help="measure nothing, write the table")
    a = p.parse_args()
    paths = {DEMO: "demo"} | ({OUTLIER: a.outlier} if a.outlier else {})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    there = {key(r) for r in read_rows()}
    for model, path in paths.items():
        pending = [
            case
            for case in ([] if a.render else every_case())
            if case[0] == model and wanted(case, a.only) and (a.again or case not in there)
        ]
        for i in range(0, len(pending), a.together):
            new = measure(pending[i : i + a.together], path, a.windows, untimed=a.untimed)
            done = {key(row) for row in new}
            kept = [r for r in read_rows() if key(r) not in done]
            where = {"commit": commit.stdout.strip(), "machine": "{cpu}, {instruction_set}".format(**environment())}
            write(kept + [row | where for row in new])
            write(read_rows())  # in the order of CASES
            render()
            print("\n".join(_line(row) for row in new), file=sys.stderr, flush=True)
    render()


if __name__ == "__main__":
    main()
