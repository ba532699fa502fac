"""One job of `tune` in a process of its own: `python -m lowbit.tuning.worker REPLY`, the request on standard input.

    {"job": "quantize", "model", "output", "words", "resume", "verbosity"}       -> the quantize document
    {"job": "evaluate", "models", "texts": {part: file}, "against", "seq_len", "windows", "verbosity"}
                                                                                 -> {part: evaluate document}
    {"job": "tasks", "models", "tasks", "against", "limit", "seed", "verbosity"} -> the evaluate document of tasks alone

REPLY gets {"result": ...} or {"error": ...}; a traceback is for bugs only.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError


def answer(request: dict[str, Any]) -> Any:
    from lowbit.console import set_verbosity

    set_verbosity(request.get("verbosity", 1))
    if request["job"] == "quantize":
        from lowbit.tuning.mixed import quantize

        return quantize(request["model"], request["output"], resume=request["resume"], **request["words"])
    if request["job"] == "tasks":
        from lowbit.accuracy.tasks import evaluate_tasks
        from lowbit.model.checkpoint import open_checkpoint

        original = open_checkpoint(request["against"])
        return evaluate_tasks(
            request["models"], original, request["tasks"], limit=request["limit"], seed=request["seed"]
        )
    from lowbit.accuracy import evaluate

    return {
        part: evaluate(
            request["models"], text, against=request["against"], seq_len=request["seq_len"], windows=request["windows"]
        )
        for part, text in request["texts"].items()
    }


def main() -> None:
    reply = Path(sys.argv[1])
    try:
        result = {"result": answer(json.loads(sys.stdin.read()))}
    except LowbitError as error:
        result = {"error": str(error)}
    except MemoryError:
        result = {"error": "out of memory"}
    partial = reply.with_suffix(".partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.rename(reply)


if __name__ == "__main__":
    main()
