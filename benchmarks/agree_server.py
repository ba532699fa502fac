"""An OpenAI-compatible server for agree_guidellm.py: lowbit's scheduler behind /v1/completions, streaming.

Not the gateway: it serves one benchmark. The model is random (its time does not depend on what its weights say) and
large enough that a step takes several times as long as handling it takes a client. Every token is sent as it is there,
as its number, so that no token is without text; nothing is kept between requests.

    python benchmarks/agree_server.py PORT [--layers 4]
"""

import argparse
import json
import queue
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ablation import SHAPE, make_models

from lowbit.runtime.base import Engine
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.scheduler import Scheduler

NAME = "random"
Answers = queue.Queue[int | None]


class Loop:
    """The one thread that steps the scheduler."""

    def __init__(self, engine: Engine, sequences: int) -> None:
        self._scheduler = Scheduler(engine, max_running=sequences, reuse=False)
        self._asked: queue.Queue[tuple[list[int], int, Answers]] = queue.Queue()
        self._open: dict[int, tuple[Answers, int]] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, prompt: list[int], tokens: int) -> Answers:
        answers: Answers = queue.Queue()
        self._asked.put((prompt, tokens, answers))
        return answers

    def _run(self) -> None:
        while True:
            while not self._scheduler.busy or not self._asked.empty():
                prompt, tokens, answers = self._asked.get()
                number = self._scheduler.submit(prompt, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
                self._open[number] = (answers, tokens)
            for event in self._scheduler.step():
                answers, left = self._open.pop(event.request)
                answers.put(None if event.output is None else event.output.token)
                if event.output is not None and left > 1:
                    self._open[event.request] = (answers, left - 1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loop: Loop
    tokenizer: Any

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": NAME, "object": "model"}]}
        self._whole(models if self.path == "/v1/models" else {}, 200)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or not asked.get("stream"):
            self._whole({"error": {"message": "only streamed /v1/completions"}}, 404)
            return
        tokens = int(asked.get("max_tokens") or 16)
        prompt = self.tokenizer.encode(asked["prompt"])
        answers = self.loop.ask(prompt, tokens)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for n in range(tokens):
            token = answers.get()
            if token is None:
                break
            last = "length" if n + 1 == tokens else None
            self._event({"choices": [{"index": 0, "text": f" {token}", "finish_reason": last}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        event = {"id": "0", "object": "text_completion", "model": NAME, **content}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _whole(self, content: dict[str, Any], status: int) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: printing takes the time that is measured."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("port", type=int)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--sequences", type=int, default=8)
    a = p.parse_args()
    SHAPE["num_hidden_layers"] = a.layers
    with tempfile.TemporaryDirectory() as place:
        engine = make_models(Path(place))[True, "none"]
        Handler.loop, Handler.tokenizer = Loop(engine, a.sequences), engine.tokenizer
        print("ready", flush=True)
        ThreadingHTTPServer(("127.0.0.1", a.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
