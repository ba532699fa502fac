"""The tables of docs/benchmarking.md from benchmarks/results/: agreement, ablation, search, whatif.

python benchmarks/docs_tables.py [--results DIRECTORY] [--docs FILE]
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS, RESULTS = ROOT / "docs" / "benchmarking.md", ROOT / "benchmarks" / "results"
FIGURES = {
    "ttft_s": ("time to first token", 1e3, "ms"),
    "tpot_s": ("time per token", 1e3, "ms"),
    "tokens_per_s": ("tokens a second", 1.0, ""),
}


def rows(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def made_on(document: dict[str, Any]) -> str:
    e = document["environment"]
    return f"\n{e['cpu']}, {e['cores']} cores, {document['created'][:10]}.\n"


def agreement(d: dict[str, Any]) -> str:
    body = []
    for key, c in d["figures"].items():
        label, factor, unit = FIGURES[key]
        i = c["ratio"]
        values = tuple(f"{c[tool] * factor:.4g} {unit}".strip() for tool in ("lowbit", "guidellm"))
        ratio = f"{i['estimate']:.3f} ({i['low']:.3f} to {i['high']:.3f})"
        body.append((label, *values, ratio, f"{c['own_spread']:.1%}", "yes" if c["within_noise"] else "no"))
    return rows(("median of rounds", "lowbit", "GuideLLM", "ratio", "noise", "within it"), body) + made_on(d)


def ablation(d: dict[str, Any]) -> str:
    body = [
        (
            r["name"],
            f"{r['seconds']:.2f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['speedup']:.2f}x",
            str(r["tokens_computed"]),
            f"{r['equal_tokens']:.0%}",
        )
        for r in d["rows"]
    ]
    w = d["workload"]
    head = ("", "seconds", "tokens/s", "speed-up", "tokens computed", "same tokens")
    said = f"\n{w['requests']} requests of {w['shared']} common and {w['own']} own tokens, {w['answer']} tokens each. "
    return rows(head, body) + said + made_on(d).lstrip()


def search(d: dict[str, Any]) -> str:
    tried = {r["name"]: r for r in d["search"]}
    body = []
    for r in d["exhaustive"]:
        tpot = "" if r["tpot_s"] is None else f"{r['tpot_s'] * 1e3:.3f} ms"
        body.append((f"`{r['name']}`", tpot, r["verdict"], tried[r["name"]]["verdict"]))
    seconds = d["processor_seconds"]
    said = (
        f"\nThe search found `{d['found']}` in {seconds['search']:.0f} s of processor time; trying everything took "
        f"{seconds['exhaustive']:.0f} s ({d['share_of_time']:.0%}), and the fastest of all is `{d['fastest']}`"
        + ("" if d["tpot_of_found_over_fastest"] is None else f" ({d['tpot_of_found_over_fastest']:.3f} x its time)")
        + ". "
    )
    return rows(("candidate", "time per token", "exhaustive", "search"), body) + said + made_on(d).lstrip()


def whatif(d: dict[str, Any]) -> str:
    body = []
    for result in d["results"]:
        for p in result["predictions"]:
            s = p["scenario"]
            shape = f"{s['prompt_length']} + {s['output_length']} x {s['batch_size']}"
            cells = [
                cell
                for kind in ("ttft", "tpot")
                for cell in (f"{p[kind]['measured_s'] * 1e3:.3g} ms", f"{p[kind]['error']:+.1%}")
            ]
            body.append((result["model"], shape, *cells))
    said = f"\nThe largest error is {d['largest_error']:.1%}. "
    head = ("model", "prompt + output x batch", "TTFT measured", "predicted", "TPOT measured", "predicted")
    return rows(head, body) + said + made_on(d).lstrip()


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "agreement": ("agreement.json", agreement),
    "ablation": ("ablation.json", ablation),
    "search": ("tune_search.json", search),
    "whatif": ("whatif.json", whatif),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--docs", type=Path, default=DOCS)
    a = p.parse_args()
    text = a.docs.read_text(encoding="utf-8")
    for name, (file, table) in TABLES.items():
        found = json.loads((a.results / file).read_text(encoding="utf-8")) if (a.results / file).exists() else {}
        if not found.get("finished"):
            print(f"{name}: {file} is {'not finished' if found else 'not there'} yet")
            continue
        marks = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        shown = marks[0] + table(found) + marks[1]
        text, replaced = re.subn(f"{marks[0]}.*?{marks[1]}", lambda _m, s=shown: s, text, flags=re.S)
        print(f"{name}: " + ("written" if replaced else f"no markers in {a.docs}"))
    a.docs.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
