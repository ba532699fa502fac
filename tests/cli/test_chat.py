"""lowbit chat as a person uses it: on a terminal, through a pipe, once."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from lowbit.cli import main
from lowbit.console import set_verbosity
from lowbit.kernels.pack import native

pytestmark = [pytest.mark.model, pytest.mark.skipif(native is None, reason="the compiled kernels were not built")]
CHAT = (sys.executable, "-m", "lowbit", "chat")


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def conversational(tiny: Path, tmp_path: Path) -> Path:
    """A tiny model with a chat template."""
    path = Path(shutil.copytree(tiny, tmp_path / "conversational"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def chat(*words: object, say: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *map(str, words)], input=say, capture_output=True, text=True, check=False)


def own_terminal() -> None:
    """In the child: the terminal is its own, and Ctrl-C works even where the tests were started with it ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`lowbit chat` on a terminal of its own, which Ctrl-C and Ctrl-D are typed into."""

    def __init__(self, *words: object) -> None:
        self.master, slave = pty.openpty()
        slow = {"LOWBIT_ISA": "portable", "LOWBIT_NUM_THREADS": "1"}  # an answer must last until it is interrupted
        self.process = subprocess.Popen(
            [*CHAT, *map(str, words)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=own_terminal, env={**os.environ, **slow, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120, repeat: str = "") -> str:
        """Read until the pattern shows; what came up to its end. Meanwhile `repeat` is typed every few seconds: a
        Ctrl-C that comes between the prompt and the first look at the keyboard waits for the next key."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = re.search(pattern, self.seen)
            if found:
                out, self.seen = self.seen[: found.end()], self.seen[found.end() :]
                return out
            if select.select([self.master], [], [], 3)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            else:
                self.type(repeat)
        raise AssertionError(f"{pattern!r} did not come; seen: {self.seen!r}")

    def leave(self) -> int:
        self.type("\x04")
        code = self.process.wait(60)
        os.close(self.master)
        return code


def test_on_a_terminal() -> None:
    terminal = Terminal("demo", "--max-new-tokens", 1900)
    opening = terminal.wait_for("> ")
    assert "no chat template" in opening
    terminal.type("import os\n")
    terminal.wait_for(r"import os\r\nimport os\r\n")  # the answer is running
    terminal.type("\x03")
    said = terminal.wait_for(r"\[[^\]]+\]")
    assert "interrupted" in said
    assert re.search(r"TTFT \d+ ms, [\d.]+ tokens/s", said)
    terminal.wait_for("> ")
    terminal.wait_for(r"\(Ctrl-D leaves\)\r\n> ", repeat="\x03")
    terminal.type("x = " + "1 + " * 1200 + "\n")
    assert "leaves no room for an answer in the model's context of 2048" in terminal.wait_for(r"shorten it\.")
    terminal.wait_for("> ")
    assert terminal.leave() == 0


def test_through_a_pipe_with_a_template(conversational: Path, tmp_path: Path) -> None:
    words = (conversational, "--max-new-tokens", 8, "--system", "be brief", "--json", tmp_path / "chat.json")
    run = chat(*words, say="hello\n\nand more\n/clear\nhello\n")
    assert run.returncode == 0, run.stderr
    assert "no chat template" not in run.stderr
    document = json.loads((tmp_path / "chat.json").read_text())
    assert document["command"] == "chat"
    first, second, again = document["turns"]
    assert again["answer"] == first["answer"]  # the conversation was forgotten
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["generated_tokens"]  # it was remembered before
    assert run.stdout == "".join(t["answer"] + "\n" for t in document["turns"])
    assert run.stderr.count("TTFT") == 3


def run_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    """The program in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["lowbit", "chat", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    set_verbosity(0)  # as the other tests want it
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_once_with_json_and_sampling(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("demo", "--prompt", "def f(", "--max-new-tokens", 12, "--temperature", 0.8, "--top-p", 0.9, "--json", "-")
    code, out, err = run_here(capsys, monkeypatch, *words, "--seed", 7)
    assert code == 0, err
    document = json.loads(out)
    (turn,) = document["turns"]
    assert turn["answer"] in err
    assert document["seed"] == 7
    assert turn["generated_tokens"] <= 12
    assert turn["ttft_s"] > 0
    again = run_here(capsys, monkeypatch, *words, "--seed", 7, "--prompt-lookup", 4)[1]
    assert json.loads(again)["turns"][0]["answer"] == turn["answer"]
    drawn = json.loads(run_here(capsys, monkeypatch, *words)[1])
    repeated = json.loads(run_here(capsys, monkeypatch, *words, "--seed", drawn["seed"])[1])
    assert repeated["turns"][0]["answer"] == drawn["turns"][0]["answer"]  # the seed that was drawn is reported


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt", ""), "prompt is empty"),
        (("--prompt", "x " * 3000), "leaves no room for an answer"),
        (("--prompt", "x", "--system", "be brief"), "no chat template"),
        (("--prompt", "x", "--top-p", "2"), "top_p is 2.0; expected a share"),
        (("--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--prompt", "x", "--runtime", "fast"), "unknown runtime"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run_here(capsys, monkeypatch, "demo", *words)
    assert code == 2, err
    assert says in err
    assert out == ""
