"""GGUF files against llama-quantize with an importance matrix: same model, calibration text, type of every tensor.

    python benchmarks/compare_gguf.py --llama BUILD/bin --calibration TRAIN.txt --text VALIDATION.txt [--types ...]

For each type: `lowbit export` writes a file; `llama-imatrix` (once) and `llama-quantize --tensor-type-file` write one
with exactly its types; `llama-perplexity --kl-divergence`, context 512, compares both with the 16-bit original. So both
files come from 128 x 512 tokens of one text, have the same types, differ in size only by the importance matrix's
entries in the metadata, and are judged by llama.cpp itself. Only accuracy is recorded; no time is. An interrupted run
goes on with the types that are left.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from partial import known, save

HERE = Path(__file__).resolve().parent
# llama-quantize's name where it differs from ours in capitals only
THEIRS = {"q3_k": "Q3_K_S", "q4_k": "Q4_K_S"}
CONTEXT, WINDOWS = 512, 128


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def export(model: str, file: Path, kind: str, calibration: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "lowbit", "export", model, "--format", "gguf", "--type", kind, "-o", file]
    calibrated = [] if kind == "f16" else ["--calibration", calibration, "--samples", WINDOWS, "--seq-len", CONTEXT]
    run(*command, "--force", *calibrated, "-q", "--json", file.with_suffix(".json"))
    document: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    return document


def divergence(llama: Path, file: Path, base: Path) -> dict[str, float]:
    """What llama-perplexity finds: mean KL and its error, agreement, perplexity."""
    text = run(llama / "llama-perplexity", "-m", file, "-c", CONTEXT, "-t", 1, "--kl-divergence-base", base,
               "--kl-divergence")  # fmt: skip
    rows = re.findall(r"^ *\d+ +" + r" +".join([r"(-?[\d.]+) ± +([\d.]+)(?: %)?"] * 5) + r"$", text, re.M)
    ppl, _, _, _, kl, error, _, _, top, _ = map(float, rows[-1])  # running means: the last row is over all windows
    return {"kl": kl, "kl_stderr": error, "same_top": top / 100, "ppl": ppl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, help="llama.cpp's build/bin")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--types", default="q4_0,q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gguf.json")
    args = parser.parse_args()
    version = run(args.llama / "llama-perplexity", "--version").split("version: ")[-1].splitlines()[0]
    texts = {t: hashlib.sha256(getattr(args, t).read_bytes()).hexdigest() for t in ("calibration", "text")}
    settings = {"model": args.model, "context": CONTEXT, "windows": WINDOWS, "llama.cpp": version, "sha256": texts}
    results = known(args.out, settings).get("results", [])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        original, base, matrix = work / "f16.gguf", work / "base.kld", work / "imatrix.gguf"
        export(args.model, original, "f16", args.calibration)
        run(args.llama / "llama-perplexity", "-m", original, "-f", args.text, "-c", CONTEXT, "-t", 1,
            "--kl-divergence-base", base)  # fmt: skip
        run(args.llama / "llama-imatrix", "-m", original, "-f", args.calibration, "-o", matrix, "-c", CONTEXT,
            "--chunks", WINDOWS, "-t", 1)  # fmt: skip
        kinds = [k for k in args.types.split(",") if k not in {row["type"] for row in results}]
        for left, kind in zip(range(len(kinds) - 1, -1, -1), kinds, strict=True):
            ours, theirs, types = work / "ours.gguf", work / "theirs.gguf", work / "types.txt"
            document = export(args.model, ours, kind, args.calibration)
            matrices = [t for t in document["tensors"] if t["type"] != "f32"]
            types.write_text("".join(f"^{t['name'].replace('.', '[.]')}$={t['type']}\n" for t in matrices))
            run(args.llama / "llama-quantize", "--imatrix", matrix, "--tensor-type-file", types, original, theirs,
                THEIRS.get(kind, kind.upper()), 1)  # fmt: skip
            row = {"type": kind}
            for tool, file in (("lowbit", ours), ("llama-quantize --imatrix", theirs)):
                row[tool] = {"bytes": file.stat().st_size} | divergence(args.llama, file, base)
            results.append(row)
            print(json.dumps(row))
            save(args.out, settings, {"results": results}, finished=not left)


if __name__ == "__main__":
    main()
