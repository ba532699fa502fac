"""What every peer is given and how every peer is judged.

Calibration: the text is tokenized whole, without special tokens; 128 windows of 512 tokens start at positions drawn by
numpy's default_rng(0). Evaluation: non-overlapping windows of 512 tokens, the remainder dropped. Perplexity,
KL(reference || quantized) in nats and top-1 agreement run over every position of a window but its last, against the
float32 original. MODEL, CALIBRATION and EVALUATION in the environment replace the demo model and its text.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "src/lowbit/demo"
MODEL = str(Path(os.environ.get("MODEL", DEMO / "model")).resolve())
CALIBRATION = Path(os.environ.get("CALIBRATION", DEMO / "calibration.txt")).resolve()
EVALUATION = Path(os.environ.get("EVALUATION", DEMO / "evaluation.txt")).resolve()
WINDOW, BATCH = 512, 8


def token_ids(text: Path) -> np.ndarray:  # (tokens,) int64
    tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    return np.array(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids, dtype=np.int64)


def calibration_windows(count: int = 128) -> torch.Tensor:  # (count, WINDOW)
    ids = token_ids(CALIBRATION)
    starts = np.random.default_rng(0).integers(0, len(ids) - WINDOW, count)
    return torch.from_numpy(np.stack([ids[start : start + WINDOW] for start in starts]))


def evaluation_windows() -> torch.Tensor:  # (windows, WINDOW)
    ids = token_ids(EVALUATION)
    return torch.from_numpy(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))


def load_reference() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def judge(model: torch.nn.Module, reference: torch.nn.Module, ids: torch.Tensor) -> Iterator[np.ndarray]:
    """For a batch of windows: the sum of the negative log-likelihood, the mean KL and the agreement of each."""
    targets = ids[:, 1:, None]
    logp, ref = (  # (batch, WINDOW - 1, vocabulary)
        torch.log_softmax(m(input_ids=ids).logits[:, :-1].float(), dim=-1) for m in (model, reference)
    )
    yield -logp.gather(-1, targets).double().sum(dim=(1, 2)).numpy()
    yield (ref.exp() * (ref - logp)).sum(dim=-1).double().mean(dim=1).numpy()
    yield (ref.argmax(dim=-1) == logp.argmax(dim=-1)).double().mean(dim=1).numpy()


@torch.no_grad()
def evaluate(model: torch.nn.Module, reference: torch.nn.Module) -> dict[str, np.ndarray]:
    """One entry a window: nll (a sum), kl and agree (means over its positions), positions."""
    model.eval()
    windows = evaluation_windows()
    batches = [list(judge(model, reference, windows[i : i + BATCH])) for i in range(0, len(windows), BATCH)]
    nll, kl, agree = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return {"nll": nll, "kl": kl, "agree": agree, "positions": np.full(len(nll), WINDOW - 1)}


def machine() -> str:
    """The CPU's name, family and model (a virtual machine's name alone says little) and the number of cores."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    field = {key.strip(): value.strip() for key, value in cpu.items()}
    cores = len(os.sched_getaffinity(0))
    return f"{field['model name']} (family {field['cpu family']}, model {field['model']}), {cores} cores"


class Stopwatch:
    """Wall and processor seconds of a `with` block, and how busy the machine was before it (one-minute load)."""

    def __enter__(self) -> "Stopwatch":
        self.load = os.getloadavg()[0]
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, processor = self.start
        self.seconds, self.cpu_seconds = time.perf_counter() - wall, time.process_time() - processor


def arguments(name: str, choices: tuple[str, ...], usage: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=usage)
    parser.add_argument(name, choices=choices)
    parser.add_argument("--windows", type=Path, help="write the per-window results to this .npz file")
    args = parser.parse_args()
    args.windows = args.windows and args.windows.resolve()  # some tools are run in another directory
    return args


def keep_stdout() -> int:
    """Whatever a tool prints from here on goes to stderr; returns the descriptor of the real stdout."""
    real = os.dup(1)
    os.dup2(2, 1)
    return real


def report(
    stdout: int, package: str, kind: str, watch: Stopwatch, windows: dict[str, np.ndarray], save: Path | None
) -> None:
    """Print the one JSON line. The peak is the whole process's, with its imports and the evaluation."""
    positions = windows["positions"]
    row: dict[str, Any] = {
        "tool": package,
        "version": version(package),
        "kind": kind,
        "seconds": round(watch.seconds, 2),
        "perplexity": round(float(np.exp(windows["nll"].sum() / positions.sum())), 4),
        "kl": round(float(np.average(windows["kl"], weights=positions)), 6),
        "top1": round(float(np.average(windows["agree"], weights=positions)), 5),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpu_seconds": round(watch.cpu_seconds, 2),
        "load_before": round(watch.load, 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if save is not None:
        np.savez(save, **windows)
    os.write(stdout, (json.dumps(row) + "\n").encode())
