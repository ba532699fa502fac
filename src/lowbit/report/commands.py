"""The commands that a reader of the report can paste."""

import shlex
from typing import Any

from lowbit.report.words import number


def reproduce(document: dict[str, Any]) -> str:
    """The command that measures all of it again."""
    limits = document.get("limits") or {}
    words = ["lowbit", "tune", str(document.get("model") or "MODEL")]
    increase, memory = number(limits.get("max_ppl_increase")), number(limits.get("max_memory"))
    words += ["--text", str(document["text"])] if document.get("text") else []
    words += ["--calibration", str(document["calibration"])] if document.get("calibration") else []
    words += ["--max-ppl-increase", f"{100 * increase:.10g}%"] if increase is not None else []
    words += ["--max-memory", str(int(memory))] if memory is not None else []
    for key in ("max_kl", "max_ttft", "max_tpot"):
        most = number(limits.get(key))
        words += [f"--{key.replace('_', '-')}", f"{most:.10g}"] if most is not None else []
    words += _more(limits)
    words += ["--optimize", str(limits["optimize"])] if limits.get("optimize") else []
    if document.get("own_candidates"):
        for key in ("method", "scheme"):
            tried = dict.fromkeys(str(c.get(key)) for c in document.get("candidates") or [])
            words += [f"--{key}s", ",".join(tried)]
    words += ["--exhaustive"] if document.get("exhaustive") else []
    words += ["--repeats", str(document["repeats"])] if document.get("repeats") else []
    words += ["--seed", str(document["seed"])] if document.get("seed") is not None else []
    words += ["-o", str(document.get("output") or "OUT")]
    return shlex.join(words)


def _more(limits: dict[str, Any]) -> list[str]:
    """Tasks, and what is held at a concurrency."""
    words = ["--tasks", ",".join(limits["tasks"])] if limits.get("tasks") else []
    for key, plain in (
        ("task_limit", None), ("max_task_drop", None), ("min_throughput", None), ("max_cost", None),
        ("concurrency", 1), ("hardware", "this machine"),
    ):  # fmt: skip
        value = limits.get(key)
        if value is not None and value != plain:
            words += [f"--{key.replace('_', '-')}", value if isinstance(value, str) else f"{value:.10g}"]
    return words


def deploy(document: dict[str, Any], chosen: dict[str, Any] | None) -> dict[str, str] | None:
    """How to serve the chosen model and to check its speed there, or None without one."""
    if chosen is None or not chosen.get("path"):
        return None
    path, model = str(chosen["path"]), str(document.get("model") or "MODEL")
    return {
        "serve": shlex.join(["lowbit", "serve", str(document.get("output") or path)]),
        "vllm": shlex.join(["vllm", "serve", path]),
        "bench": shlex.join(["lowbit", "bench", path, "--against", model]),
    }
