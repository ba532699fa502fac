"""Engines of other projects: servers that start, answer and end; llama-server itself where LLAMA_CPP names it."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from lowbit.accuracy import evaluate
from lowbit.accuracy.measure import measure
from lowbit.errors import InputError
from lowbit.exporting import export
from lowbit.model.checkpoint import DEMO
from lowbit.runtime.engine import load
from lowbit.runtime.outside import attach
from lowbit.runtime.served import ServedEngine
from lowbit.runtime.server import Server, Serving
from lowbit.speed import bench

LLAMA_SERVER = os.environ.get("LLAMA_CPP")

# A server that gets healthy late, with a process of its own that ignores SIGTERM, as vLLM's engine may
SLOW = """
import http.server, signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("helper", helper.pid, flush=True)
begin = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > begin + 0.5 else 503)
        self.end_headers()
    def log_message(self, *_args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def slow(port: int) -> list[str]:
    return [sys.executable, "-c", SLOW, str(port)]


def gone(processes: list[psutil.Process], seconds: float = 20) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return all(p.status() == psutil.STATUS_ZOMBIE for p in alive if p.is_running())


def test_a_server_is_ready_when_it_says_so_and_ends_with_its_helpers() -> None:
    server = Server("slow", slow)
    processes = server.processes()
    assert len(processes) == 2  # the server and its helper
    assert "helper" in server.log()
    assert server.peak_memory() > 5_000_000
    server.stop()
    assert gone(processes)
    server.stop()  # harmless


def test_a_server_ends_even_if_lowbit_is_killed() -> None:
    code = (
        "import sys, time\nfrom lowbit.runtime.server import Server\n"
        f"server = Server('slow', lambda port: [sys.executable, '-c', {SLOW!r}, str(port)])\n"
        "print(*(p.pid for p in server.processes()), flush=True)\ntime.sleep(600)\n"
    )
    lowbit = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert lowbit.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in lowbit.stdout.readline().split()]
    assert len(processes) == 2
    os.kill(lowbit.pid, signal.SIGKILL)
    lowbit.wait()
    assert gone(processes)


def test_a_server_that_does_not_start_is_named_with_its_last_words() -> None:
    with pytest.raises(InputError, match=r"broken ended with status 3. It last said:\nno such model"):
        Server("broken", lambda _port: [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"])
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"deaf was not ready after 0\.3 s"):
        Server("deaf", lambda _port: [sys.executable, "-c", "import time; time.sleep(600)"], timeout=0.3)
    assert time.monotonic() - begin < 30


def test_what_an_engine_cannot_read_or_find_is_said_before_it_starts(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llama.cpp reads GGUF files. Make one: lowbit export .* --format gguf"):
        load(tiny, "llama.cpp")
    export(tiny, tmp_path / "m.gguf", "gguf", type="f32")
    with pytest.raises(InputError, match=r"no program 'absent': install llama.cpp"):
        load(tmp_path / "m.gguf", "llama.cpp", Serving(program="absent"))
    with pytest.raises(InputError, match=r"no program 'absent': install vLLM"):
        load(tiny, "vllm", Serving(program="absent"))
    with pytest.raises(InputError, match=r"258 tokens are needed and its context is 256.*lower --seq-len"):
        load(tiny, "vllm", Serving(256 + 2, program=sys.executable))


@pytest.mark.parametrize("name", ["vllm", "python3.11"])
def test_vllm_is_started_by_its_program_or_its_python(tiny: Path, tmp_path: Path, name: str) -> None:
    """The words that reach the program, by a program that says them and ends."""
    program = tmp_path / name
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:])\nraise SystemExit(1)\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    start = "serve" if name == "vllm" else "-m vllm.entrypoints.openai.api_server --model"
    with pytest.raises(
        InputError, match=rf"vLLM's server ended.*\n{start} {tiny} --host 127.0.0.1 .*--max-model-len 64"
    ):
        load(tiny, "vllm", Serving(64, program=str(program)))


# /completion of llama-server over lowbit's own engine: what is asked is what llama-server takes, what comes back is its
FAKE = """#!{python}
import http.server, json, sys, torch
from lowbit.runtime.engine import load
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
engine = load(words["-m"], "float32")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(json.dumps({{"build_info": "b0"}}))
    def do_POST(self):
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        own = engine.logits(torch.tensor([ask["prompt"]]))[0, -1].log_softmax(-1)
        if "n_probs" in ask:
            top = own.topk(ask["n_probs"])
            pairs = [{{"id": i, "logprob": v}} for v, i in zip(top.values.tolist(), top.indices.tolist())]
            return self.reply(json.dumps({{"completion_probabilities": [{{"top_logprobs": pairs}}]}}))
        assert ask["stream"] and ask["ignore_eos"] and not ask["cache_prompt"]
        tokens = [int(t) for t in engine.stream(torch.tensor([ask["prompt"]]), ask["n_predict"])]
        events = [{{"tokens": [t], "tokens_predicted": n + 1}} for n, t in enumerate(tokens)]
        del events[1]  # a token that ends within a character has no event
        events.append({{"tokens": [], "tokens_predicted": len(tokens), "stop": True}})
        return self.reply("".join(f"data: {{json.dumps(e)}}\\n\\n" for e in events))
    def reply(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *_args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(words["--port"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program that takes llama-server's words and answers in them."""
    file = tmp_path_factory.mktemp("bin") / "llama-server"
    file.write_text(FAKE.format(python=sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model in full precision and in Q4_0."""
    place = tmp_path_factory.mktemp("gguf")
    export(tiny, place / "full.gguf", "gguf", type="f32")
    export(tiny, place / "small.gguf", "gguf", type="q4_0", method="search")
    return place / "full.gguf", place / "small.gguf"


def test_tokens_and_log_probabilities_come_through(files: tuple[Path, Path], program: str) -> None:
    own = load(files[0], "float32")
    x = torch.arange(10, 34).reshape(2, 12)
    with load(files[0], "llama.cpp", Serving(64, 2, program)) as engine:
        assert engine.address is not None
        assert engine.peak_memory() > 0
        expected = own.logits(x).log_softmax(-1)
        assert torch.allclose(engine.logits(x), expected, atol=1e-5)
        here, there = (torch.stack(list(e.stream(x, 5))) for e in (own, engine))
        assert there[1].tolist() == [-1, -1]  # the server told that there was one, and not which
        keep = [0, 2, 3, 4]
        assert torch.equal(there[keep], here[keep])
        assert engine.generate([5, 6, 7], max_new_tokens=4) == own.generate([5, 6, 7], max_new_tokens=4)
        attached = attach(engine.address, own.checkpoint)
        assert torch.allclose(attached.logits(x[:1]), expected[:1], atol=1e-5)
        attached.top = 50
        some = attached.logits(x[:1])
        assert int((some > -torch.inf).sum(-1).max()) == 50


def test_evaluate_and_bench_run_on_it(files: tuple[Path, Path], program: str, tmp_path: Path) -> None:
    full, small = files
    text = tmp_path / "t.txt"
    text.write_text((DEMO / "evaluation.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    words = {"against": full, "seq_len": 32, "windows": 2}
    there = evaluate([small], text, **words, runtime="llama.cpp", program=program)
    here = evaluate([small], text, **words, runtime="float32")
    assert there["noise_floor"]["kl"] < 1e-6
    for key in ("perplexity", "top1_agreement"):
        assert there["results"][0][key] == pytest.approx(here["results"][0][key], rel=1e-5)
    assert there["results"][0]["kl"]["mean"] == pytest.approx(here["results"][0]["kl"]["mean"], rel=1e-3)
    shape = {"prompt_lengths": [6], "output_lengths": [3], "batch_sizes": [2], "repeats": 1}
    document = bench([small], against=full, **shape, runtime="llama.cpp", program=program)
    assert [r["runtime"] for r in document["results"]] == ["llama.cpp b0"] * 2
    for row in document["results"]:
        assert row["e2e_s"]["median"] == pytest.approx(row["ttft_s"]["median"] + 2 * row["tpot_s"]["median"], rel=1e-6)
        assert row["memory_above_import_bytes"] == row["peak_memory_bytes"] > 0


def test_tokens_that_a_server_does_not_report_count_as_one() -> None:
    """KL over {each reported token, all others} by hand; no more than the true divergence."""
    g = torch.Generator().manual_seed(0)
    truth, own = (torch.randn(1, 5, 40, generator=g).log_softmax(-1) for _ in range(2))
    windows = torch.randint(0, 40, (1, 5), generator=g)
    top = own.topk(30).indices
    reported = torch.full_like(own, -torch.inf).scatter(-1, top, own.gather(-1, top))
    full, part = (measure(lambda _t: truth, [lambda _t, q=q: q], windows, 40)[1] for q in (own, reported))
    expected = 0.0
    for p, q, kept in zip(truth[0, :-1].exp(), own[0, :-1].exp(), top[0, :-1], strict=True):
        rest_p, rest_q = 1 - float(p[kept].sum()), 1 - float(q[kept].sum())
        inside = float((p[kept] * (p[kept] / q[kept]).log()).sum())
        expected += (inside + rest_p * float(torch.log(torch.tensor(rest_p / rest_q)))) / 4
    assert float(part.kl[0]) == pytest.approx(expected, rel=1e-4)
    assert float(part.kl[0]) < float(full.kl[0])
    assert part.agreement.tolist() == full.agreement.tolist()


def test_a_server_that_gives_no_log_probabilities_is_refused(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import http.server, sys\nclass H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        ok = self.path in ('/health', '/v1/models')\n"
        "        self.send_response(200 if ok else 404); self.end_headers()\n"
        f"        self.wfile.write({json.dumps({'data': [{'id': 'm'}]}).encode()!r} if ok else b'')\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    server = Server("other", lambda port: [sys.executable, "-c", code, str(port)])
    text = tmp_path / "t.txt"
    text.write_text("def f(x):\n    return x\n" * 40)
    try:
        with pytest.raises(InputError, match=r"neither llama-server nor vLLM nor lowbit.*bench works with any server"):
            evaluate([server.address], text, against=tiny, seq_len=32)
    finally:
        server.stop()


@pytest.mark.interop
@pytest.mark.interop_heavy
@pytest.mark.skipif(not LLAMA_SERVER, reason="LLAMA_CPP names no llama-server")
def test_llama_server_agrees_and_ends(tmp_path: Path) -> None:
    export("demo", tmp_path / "demo.gguf", "gguf", type="f32")
    x = torch.arange(500, 564)[None]
    own = load("demo", "float32").logits(x).log_softmax(-1)
    with load(tmp_path / "demo.gguf", "llama.cpp", Serving(128, 2, LLAMA_SERVER)) as engine:
        theirs = engine.logits(x).log_softmax(-1)
        assert float((own.argmax(-1) == theirs.argmax(-1)).double().mean()) >= 0.99
        assert float((own - theirs).abs().mean()) <= 0.01
        assert all(len(step) == 2 for step in engine.stream(x.repeat(2, 1)[:, :16], 8))
        processes = engine._server.processes()  # type: ignore[attr-defined]
    assert gone(processes)


@pytest.mark.interop
@pytest.mark.interop_heavy
@pytest.mark.skipif(not LLAMA_SERVER, reason="LLAMA_CPP names no llama-server")
def test_the_library_says_what_the_server_says(tiny: Path, tmp_path: Path) -> None:
    """llama-cpp-python gives a whole text's logits at once, llama-server one token's; for texts of two lengths."""
    pytest.importorskip("llama_cpp")
    export(tiny, tmp_path / "m.gguf", "gguf", type="f32")
    own = load(tiny, "float32")
    with load(tmp_path / "m.gguf", "llama.cpp", Serving(64, 1, LLAMA_SERVER)) as engine:
        for x in (torch.arange(10, 26)[None], torch.arange(10, 74).reshape(2, 32)):
            found = engine.logits(x).log_softmax(-1)
            assert engine._loaded is not None  # type: ignore[attr-defined]
            for other in (ServedEngine.logits(engine, x), own.logits(x).log_softmax(-1)):  # type: ignore[arg-type]
                assert float((found - other).abs().mean()) < 1e-3  # keys and values are in half precision there
                assert float((found - other).abs().max()) < 0.02
