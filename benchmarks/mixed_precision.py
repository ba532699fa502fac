"""Mixed precision at 3.5 bits against every uniform scheme of that size: KL, window by window.

    python benchmarks/mixed_precision.py [--bits 3.5] [--windows N] [--output FILE]

All round by GPTQ (a lattice by QuIP, which is its method) with the same 128 x 512 tokens of the demo's calibration text
and are evaluated on its evaluation text in windows of 512: weights dequantized, float32. Every scheme saw the same
windows, so the differences are paired. Rows are written three at a time; rows that are there are skipped, so
an interrupted run goes on where it was. The table between the markers of docs/methods.md is made anew at the end.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from partial import RESULTS, ROOT, commit, known, save

import lowbit
from lowbit.intervals import kl_difference

FILE, DOCS = RESULTS / "mixed.json", ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- mixed: begin -->\n", "<!-- mixed: end -->\n"
UNIFORM = (  # what has between 3 and 3.5 bits a weight on this model
    ("w3a16-g128", "gptq"), ("w3a16-g32", "gptq"), ("w3a16-g64", "gptq"), ("w3a16-channel", "gptq"),
    ("w3a16-g128-asym", "gptq"), ("w3a16-g64-asym", "gptq"), ("any3", "gptq"), ("e8p3", "quip"),
)  # fmt: skip
TOGETHER = 3  # schemes evaluated in one pass, then written


def measure(cases: list[tuple[str, str]], samples: int, windows: int) -> list[dict[str, Any]]:
    """One row a case, with the KL of every window; what they are compared with is computed once."""
    texts = {name: ROOT / "src" / "lowbit" / "demo" / f"{name}.txt" for name in ("calibration", "evaluation")}
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / f"{n}" for n in range(len(cases))]
        made = [
            lowbit.quantize("demo", path, scheme=s, method=m, samples=samples, calibration=str(texts["calibration"]))
            for path, (s, m) in zip(paths, cases, strict=True)
        ]
        found = lowbit.evaluate(
            paths, texts["evaluation"], against="demo", seq_len=512, windows=windows, runtime="float32"
        )["results"]
    return [
        {
            "scheme": scheme, "method": method, "commit": commit(), "bits_per_weight": document["bits_per_weight"],
            "perplexity": row["perplexity"], "perplexity_increase": row["perplexity_increase"],
            "top1_agreement": row["top1_agreement"], "kl": row["kl"],
            "kl_per_window": [float(f"{k:.5g}") for k in row["per_window"]["kl"]],
        }
        for (scheme, method), document, row in zip(cases, made, found, strict=True)
    ]  # fmt: skip


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every uniform row against the mixed one, the first: its KL minus the mixed one's, and how many times it."""
    mixed = np.array(rows[0]["kl_per_window"])
    return [
        {
            "scheme": r["scheme"],
            "difference": kl_difference(np.array(r["kl_per_window"]), mixed).to_dict(),
            "times": float(np.mean(r["kl_per_window"]) / mixed.mean()),
        }
        for r in rows[1:]
    ]


def table(document: dict[str, Any]) -> str:
    rows, against = document["rows"], {c["scheme"]: c for c in document["against_mixed"]}
    lines = [
        "| scheme | method | bits per weight | perplexity | same top token | KL | KL over mixed (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        c = against.get(r["scheme"])
        more = (
            "" if c is None else f"{c['times']:.2f}x ({c['difference']['low']:+.5f} to {c['difference']['high']:+.5f})"
        )
        lines.append(
            f"| `{r['scheme']}` | `{r['method']}` | {r['bits_per_weight']:.3f} | {r['perplexity_increase']:+.2%} "
            f"| {r['top1_agreement']:.1%} | {r['kl']['mean']:.5f} ± {r['kl']['stderr']:.5f} | {more} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bits", type=float, default=3.5)
    p.add_argument("--samples", type=int, default=128)
    p.add_argument("--windows", type=int, default=128)
    p.add_argument("--output", type=Path, default=FILE)
    a = p.parse_args()
    settings = {"model": "demo", "bits": a.bits, "samples": a.samples, "windows": a.windows}
    rows: list[dict[str, Any]] = known(a.output, settings, any_commit=True).get("rows", [])
    done = {(r["scheme"], r["method"]) for r in rows}
    left = [case for case in ((f"auto:{a.bits:g}", "gptq"), *UNIFORM) if case not in done]
    for at in range(0, len(left), TOGETHER):
        rows += measure(left[at : at + TOGETHER], a.samples, a.windows)
        save(a.output, settings, {"rows": rows}, finished=False)
        print(f"{len(rows)} of {len(UNIFORM) + 1} schemes", flush=True)
    document = save(a.output, settings, {"rows": rows, "against_mixed": compared(rows)}, finished=True)
    print(table(document))
    if a.output == FILE:
        before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
        DOCS.write_text(before + BEGIN + table(document) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
