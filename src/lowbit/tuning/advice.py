"""What to expect before anything is measured: rules of thumb with their sources, and an order of candidates.

Rules only order; nothing is left out because of one, and the measured answer stands next to the expected one. Where
a source's figure is a rule of thumb it is called that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.scheme import Scheme

Task = Literal["chat", "code", "math"]
Device = Literal["cpu", "apple", "gpu-fp8", "gpu-int8", "edge"]
SMALL_BATCH, LARGE_BATCH, LONG_CONTEXT = 4, 16, 8192


@dataclass(frozen=True)
class Situation:
    """What is known before measuring. `task` None: not said."""

    device: Device
    batch_size: int = 1
    context: int = 2048
    task: Task | None = None


@dataclass(frozen=True)
class Rule:
    """Points for (or against) a scheme in a situation, and where that comes from."""

    name: str
    applies: Callable[[Situation], bool]
    points: Callable[[Scheme], float]
    says: str
    source: str


def _bits(scheme: Scheme) -> int:
    return 16 if scheme.weight is None else scheme.weight.bits


def _kind(scheme: Scheme) -> str:
    if scheme.weight is None:
        return "none"
    if scheme.weight.kind == "float":
        return "fp8" if scheme.weight.bits == 8 else "fp4"
    return "w+a" if scheme.activation is not None else f"w{min(scheme.weight.bits, 8)}"


def _prefer(*kinds: str) -> Callable[[Scheme], float]:
    """The first kind gets most points, each next one fewer, others none."""
    return lambda scheme: float(len(kinds) - kinds.index(_kind(scheme))) if _kind(scheme) in kinds else 0.0


RULES = (
    Rule(
        "small batch",
        lambda s: s.batch_size <= SMALL_BATCH,
        _prefer("w4", "w3", "w8"),
        f"up to batch {SMALL_BATCH} a step waits for weights to arrive from memory: fewer weight bits, activations as "
        "they are",
        "Lin et al., AWQ, MLSys 2024, §4.1 (arithmetic intensity of decoding)",
    ),
    Rule(
        "large batch",
        lambda s: s.batch_size >= LARGE_BATCH,
        _prefer("fp8", "w+a"),
        f"from batch {LARGE_BATCH} on, products are bound by arithmetic: quantize activations too, so that they run in "
        "8-bit units",
        "Xiao et al., SmoothQuant, ICML 2023, §1; NVIDIA TensorRT-LLM, 'Best practices for choosing the right "
        "quantization methods' (thresholds 4 and 16)",
    ),
    Rule(
        "FP8 hardware",
        lambda s: s.device == "gpu-fp8",
        _prefer("fp8", "w4"),
        "Ada and Hopper multiply FP8 natively with the least loss of accuracy",
        "Micikevicius et al., FP8 formats for deep learning, 2022; NVIDIA TensorRT-LLM, as above",
    ),
    Rule(
        "older GPU",
        lambda s: s.device == "gpu-int8",
        _prefer("w4", "w+a"),
        "before Ada there is no FP8: INT4 weights (AWQ, GPTQ) for small batches, INT8 (SmoothQuant) for large ones",
        "NVIDIA TensorRT-LLM, as above; Xiao et al., SmoothQuant, 2023",
    ),
    Rule(
        "Apple silicon",
        lambda s: s.device == "apple",
        _prefer("w8", "w+a", "w4"),
        "8 bits before 4 on Apple silicon: unpacking 4-bit weights costs more there than it saves",
        "rule of thumb of the deployment guides that lowbit follows; measure before you believe it",
    ),
    Rule(
        "CPU",
        lambda s: s.device == "cpu",
        _prefer("w4", "w+a", "w8"),
        "a CPU's decoding is bound by memory, its prompt processing by int8 arithmetic",
        "Gerganov et al., llama.cpp (Q4 and Q8 weights with 8-bit activations)",
    ),
    Rule(
        "edge",
        lambda s: s.device == "edge",
        _prefer("w4", "w3"),
        "phones and edge devices are short of memory first: INT4, exported as GGUF",
        "rule of thumb of the deployment guides; GGUF of llama.cpp",
    ),
    Rule(
        "code",
        lambda s: s.task == "code",
        lambda scheme: -3.0 if _bits(scheme) < 8 else 1.0,
        "code breaks at a single wrong token: 8 bits unless 4 are measured to do",
        "rule of thumb of the deployment guides; compare Kurtic et al., 'Give me BF16 or give me death?', 2024",
    ),
    Rule(
        "mathematics",
        lambda s: s.task == "math",
        lambda scheme: -3.0 * (16 - _bits(scheme)) / 8,
        "long chains of reasoning add errors up: 16 bits unless measured otherwise",
        "Liu et al., 'Quantization hurts reasoning?', 2025; rule of thumb of the deployment guides",
    ),
    Rule(
        "long context",
        lambda s: s.context > LONG_CONTEXT,
        lambda scheme: 1.0 if _bits(scheme) == 8 else 0.0,
        f"beyond {LONG_CONTEXT} tokens the cache outweighs the weights: INT8 weights, and quantize the KV cache",
        "Hooper et al., KVQuant, NeurIPS 2024, §1; rule of thumb of the deployment guides",
    ),
    Rule(
        "few bits",
        lambda _s: True,
        lambda scheme: -2.0 * max(0, 4 - _bits(scheme)),
        "below 4 bits the loss grows quickly",
        "Dettmers and Zettlemoyer, 'The case for 4-bit precision', ICML 2023",
    ),
)


def expect(situation: Situation, schemes: Sequence[str]) -> list[dict[str, Any]]:
    """[{scheme, points, reasons[{rule, says, source}]}], most promising first; a mixed budget counts by its bits."""
    rows: list[dict[str, Any]] = []
    for word in dict.fromkeys(schemes):
        scheme = Scheme.parse(_as_uniform(word))
        reasons = [(r, r.points(scheme)) for r in RULES if r.applies(situation)]
        rows.append(
            {
                "scheme": word,
                "points": sum(p for _, p in reasons),
                "reasons": [{"rule": r.name, "says": r.says, "source": r.source} for r, p in reasons if p],
            }
        )
    return sorted(rows, key=lambda row: -float(row["points"]))


def _as_uniform(word: str) -> str:
    """auto:3.5 -> the integer scheme of as many bits, so that rules about bits apply."""
    if not word.startswith("auto:"):
        return word
    try:
        return f"w{min(max(int(float(word[5:].split(':')[0])), 2), 8)}a16"
    except ValueError:
        return "w4a16"  # a budget in bytes or seconds


def guess_device() -> Device:
    """What this machine is, as far as the rules care."""
    import platform

    import torch

    if torch.cuda.is_available():
        return "gpu-fp8" if torch.cuda.get_device_capability() >= (8, 9) else "gpu-int8"
    return "apple" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"
