"""Other projects' readers on what lowbit writes: `make interop` sets them up and runs this.

    python benchmarks/interop/run.py --readers DIR [--llama-server PROGRAM] [--only READER,...]

From the demo model it makes files, asks each reader for the log-probabilities of the same tokens (8 windows of 128 of
the demo's evaluation text), and compares them with lowbit's own float32 path on the same file: the share of positions
with the same most likely token, the mean difference of log-probabilities, and where the tokens differ, by how much
lowbit prefers its own (the median). DIR holds one virtual environment a reader; a reader that is not there is left
out, and its last result is kept.

Two correct engines differ where activations are rounded: a float's last bit decides between two codes. By how much is
seen from `float64`, lowbit against itself in double precision, and, for readers that know no float32, `bfloat16`.

Writes benchmarks/results/interop.json and, from it, docs/interop.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page import NAMES, render

import lowbit
from lowbit.calibration import tokenize
from lowbit.environment import environment
from lowbit.formats.gguf_file import read_gguf
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.runtime.engine import load
from lowbit.runtime.server import Serving

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "interop.json"
PAGE = HERE.parents[1] / "docs" / "interop.md"
LENGTH = 128


@dataclass(frozen=True)
class Case:
    """One file in front of one reader: how the file is made, and how the reader is asked."""

    reader: str
    scheme: str  # of lowbit quantize; "" for the original
    format: str  # "": as lowbit quantize writes it
    type: str | None = None  # of a GGUF file that is not carried over
    kv: str | None = None  # how keys and values are cached

    @property
    def label(self) -> str:
        return " ".join(word for word in (self.directory, self.format, self.type) if word)

    @property
    def directory(self) -> str:
        return self.scheme + (f" kv {self.kv}" if self.kv else "")


# Ends the type of a GGUF file: llama.cpp runs its weights as llama-quantize writes them out, without rounding
# activations; lowbit reads the file itself.
AS_F32 = "as f32"
ITSELF = ("float64", "bfloat16")  # lowbit against itself in another precision
ALONE = "weights alone"  # neither side rounds activations
BY_OTHERS = "by llama-quantize"
CASES = (
    *(Case("transformers", s, "") for s in ("w4a16-g128", "w4a16-g32-asym", "w8a16-channel", "fp8-block", "nvfp4")),
    Case("transformers", "fp8-block", "", ALONE),  # compressed-tensors dequantizes weights and forgets activations
    *(
        Case("gptqmodel", s, f)
        for s, f in (("w4a16-g128", "gptq"), ("w4a16-g32-asym", "gptq"), ("w4a16-g32-asym", "awq"))
    ),
    *(Case("llama.cpp", "", "gguf", t) for t in ("f32", "q8_0", f"q8_0 {AS_F32}", "q4_0", f"q4_0 {AS_F32}")),
    *(Case("llama.cpp", "w4a16-g32", "gguf", t) for t in (None, AS_F32)),
    *(
        Case("llama.cpp", "", "gguf", f"{t} {BY_OTHERS} {AS_F32}")
        for t in ("q8_0", "q4_0", "q5_0", "q4_k_m", "q3_k_m", "q2_k")
    ),
    *(
        Case("llmcompressor", s, "made there")
        for s in ("W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "W8A8", f"W8A8 {ALONE}")
    ),
    *(Case("gptqmodel", s, "made there") for s in ("gptq 4 bits", "gptq 8 bits")),
    *(Case("onnx", s, "onnx") for s in ("w4a16-g32", "w4a16-g128", "w8a16-channel", "w8a8", "w4a8")),
    Case("float64", "w8a8", ""),
    Case("bfloat16", "w4a16-g128", ""),
    Case("gguf", "w4a16-g32", "gguf"),
    *(Case("gguf", "", "gguf", t) for t in ("q8_0", "q4_0", "q4_k_m", "q3_k_m", "q2_k", "q5_0")),
    Case("vllm", "", ""),
    *(Case("vllm", s, "") for s in ("w4a16-g128", "w8a8", "any4", "e8p2")),
    Case("vllm", "none", "", kv="fp8"),
)
METHODS = {"any4": "any4", "e8p2": "quip"}


def make(case: Case, work: Path) -> Path:
    """The directory or file of a case, made once in `work`."""
    directory = DEMO / "model"
    if case.scheme:
        directory = work / case.directory.replace(" ", "-")
        if not directory.exists():
            method = METHODS.get(case.scheme, "rtn")
            words: dict[str, Any] = {"kv": case.kv} if case.kv else {}
            lowbit.quantize("demo", directory, scheme=case.scheme, method=method, samples=16, seq_len=128, **words)
    if not case.format:
        return directory
    suffix = ".gguf" if case.format == "gguf" else ""
    target = work / f"{case.label.replace(' ', '-')}{suffix}"
    if not target.exists() and case.type and case.type.endswith(AS_F32):
        llama_quantize("--allow-requantize", make(before_f32(case), work), target, "F32")
    elif not target.exists() and case.type and case.type.endswith(BY_OTHERS):
        llama_quantize(make(replace(case, type="f32"), work), target, case.type.split()[0].upper())
    elif not target.exists():
        words = {"type": case.type} if case.type else {}
        if case.type not in (None, "f32"):
            words |= {"method": "search", "samples": 4, "seq_len": 128}
        lowbit.export(directory, target, case.format, **words)
    return target


def before_f32(case: Case) -> Case:
    """The file whose weights were written out in F32."""
    return replace(case, type=(case.type or "").removesuffix(AS_F32).strip() or None)


def llama_quantize(*words: str | Path) -> None:
    subprocess.run(["llama-quantize", *words], check=True, capture_output=True)


def windows(count: int) -> torch.Tensor:
    """(count, LENGTH) tokens, spread over the demo's evaluation text."""
    tokenizer = load_tokenizer(open_checkpoint("demo"))
    ids = tokenize((DEMO / "evaluation.txt").read_text(encoding="utf-8"), tokenizer)
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    return torch.from_numpy(np.stack([ids[s : s + LENGTH] for s in starts]).astype(np.int64))


def agreement(own: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """Of log-probabilities (windows, tokens, vocabulary)."""
    differ = own.argmax(-1) != theirs.argmax(-1)
    chosen = own.gather(-1, theirs.argmax(-1, keepdim=True))[..., 0]
    found = {
        "same_token": 1 - float(differ.double().mean()),
        "mean_difference": float((own - theirs).abs().double().mean()),
    }
    if bool(differ.any()):
        found["gap"] = float((own.amax(-1) - chosen)[differ].median())
    return found


def in_its_environment(python: Path, script: str, work: Path, *words: Any) -> Any:
    """Run a reader's script on `words`, a directory and tokens: (log-probabilities, what it says about itself)."""
    *first, tokens = words
    given, found = work / "tokens.npy", work / "found.npz"
    np.save(given, tokens.numpy())
    done = subprocess.run([python, HERE / script, *first, given, found], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {Path(first[-1]).name}: {done.stderr[-1500:]}")
    return torch.from_numpy(np.load(found)["logprobs"]), json.loads(done.stdout.splitlines()[-1])


def engine(runtime: Any, program: str | None, path: Path, tokens: torch.Tensor) -> Any:
    """One of lowbit's own engines: (log-probabilities, what it says about itself)."""
    with load(path, runtime, Serving(LENGTH + 1, program=program)) as loaded:
        version = {"lowbit": lowbit.__version__}
        if runtime not in ITSELF:
            version = {NAMES[runtime]: loaded.runtime.split(",")[0]}
        return loaded.logits(tokens).float().log_softmax(-1), {"versions": version}


def gguf_values(path: Path) -> dict[str, Any]:
    """The largest difference of any tensor's values between the gguf package and lowbit."""
    import gguf

    ours, largest = read_gguf(path), 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        mine = ours.values(tensor.name).float().numpy().reshape(values.shape)
        largest = max(largest, float(np.abs(values - mine).max()))
    return {"largest_difference": largest, "versions": {"gguf": version("gguf")}}


def reader_of(name: str, args: argparse.Namespace, work: Path) -> Callable[[Path, torch.Tensor], Any] | None:
    """How a reader is asked, or None if it is not there."""
    if name in ("onnx", *ITSELF):
        return partial(engine, name, None)
    if name == "llama.cpp":
        return partial(engine, name, args.llama_server) if args.llama_server else None
    python = args.readers / name / "bin" / "python"
    ask = partial(in_its_environment, python, f"read_{name}.py", work)
    return ask if python.exists() else None


def run(case: Case, args: argparse.Namespace, work: Path) -> dict[str, Any] | None:
    row = {"reader": case.reader, "file": case.label or "bfloat16"}
    if case.reader == "gguf":
        return row | gguf_values(make(case, work))
    ask = reader_of(case.reader, args, work)
    if ask is None:
        return None
    tokens = windows(args.windows)
    if case.format == "made there":  # the other project quantizes; its directory is where lowbit reads
        path = source = work / case.label.replace(" ", "-")
        ask = partial(in_its_environment, args.readers / case.reader / "bin" / "python",
                      f"make_{case.reader}.py", work, DEMO / "model", case.scheme)  # fmt: skip
    else:
        path = source = make(case, work)
    if case.format == "onnx":
        source = make(replace(case, format=""), work)
    elif case.type and case.type.endswith(AS_F32):
        source = make(before_f32(case), work)
    theirs, about = ask(path, tokens)
    reference = load(source, "float32")
    if case.label.endswith(ALONE) or case.scheme.endswith(ALONE):
        for module in reference.net.modules():
            module._forward_pre_hooks.clear()  # what rounds a linear's input
    own = reference.logits(tokens).log_softmax(-1)
    return row | agreement(own, theirs) | {"positions": tokens.numel()} | about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=Path, default=Path("nowhere"), help="a folder of virtual environments")
    parser.add_argument("--llama-server", help="llama.cpp's llama-server")
    parser.add_argument("--only", help="readers, or a reader and a file as the page names them; by commas")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--work", type=Path, help="keep the files here, and use those that are there")
    args = parser.parse_args()
    if args.llama_server:  # llama-quantize lies beside it
        os.environ["PATH"] = os.pathsep.join([str(Path(args.llama_server).parent), os.environ["PATH"]])
    kept = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    rows = {(r["reader"], r["file"]): r for r in kept}
    failed: list[Case] = []
    with tempfile.TemporaryDirectory() as name:
        work = args.work or Path(name)
        for case in CASES:
            if args.only and not {case.reader, f"{case.reader} {case.label}"} & set(args.only.split(",")):
                continue
            try:
                row = run(case, args, work)
            except RuntimeError as error:  # one reader's failure is no reason to leave the others out
                print(f"{case.reader} {case.label} failed: {error}", file=sys.stderr)
                failed.append(case)
                continue
            if row is None:
                print(f"{case.reader}: not there", file=sys.stderr)
                continue
            print(json.dumps(row), flush=True)
            rows[row["reader"], row["file"]] = row
            order = [(c.reader, c.label or "bfloat16") for c in CASES]
            results = sorted(rows.values(), key=lambda r: order.index((r["reader"], r["file"])))
            document = {"lowbit_version": lowbit.__version__, "environment": environment(), "results": results}
            RESULTS.write_text(json.dumps(document, indent=2) + "\n")
            PAGE.write_text(render(document))
    if failed:
        sys.exit(f"{len(failed)} readers failed: {', '.join(f'{c.reader} {c.label}' for c in failed)}")


if __name__ == "__main__":
    main()
