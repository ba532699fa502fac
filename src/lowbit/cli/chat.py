"""lowbit chat"""

import contextlib
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lowbit.cli.options import Json, Kv, Program, Quiet, Runtime, Verbose, begin, check_runtime, write_document
from lowbit.console import note
from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.runtime.base import Engine
    from lowbit.runtime.sampling import SamplingParams

_INTERRUPTED = 130


def chat(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, hub id or 'demo'.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this once and stop, without asking.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this share (1: all).")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Above 0: fewer words the answer has already.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Above 0: the more often, the less likely.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws (default: a fresh one).")] = None,
    prompt_lookup: Annotated[int, typer.Option(metavar="K", help="Guess K tokens ahead from the text (0: off).")] = 0,
    runtime: Runtime = "auto",
    program: Program = None,
    kv: Kv = None,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /clear forgets the conversation."""
    begin(quiet, verbose)
    kind = check_runtime(runtime)
    from lowbit.runtime.engine import load
    from lowbit.runtime.sampling import SamplingParams, fresh_seed
    from lowbit.runtime.server import Serving

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        max_new_tokens=max_new_tokens, stop=tuple(stop or ()), seed=fresh_seed() if seed is None else seed,
    )  # fmt: skip
    engine = load(path, kind, Serving(program=program), kv=kv)
    with engine:
        talk = Talk(engine, params, prompt_lookup, sys.stderr if json == "-" else sys.stdout, system)
        if prompt is not None:
            talk.turn(prompt)
        else:
            _interactive(talk)
    document = {"model": path, "runtime": engine.runtime, "template": talk.template, "turns": talk.turns}
    write_document("chat", document, json, params.seed or 0)
    if prompt is not None and talk.turns[-1]["finish"] == "interrupted":
        raise typer.Exit(_INTERRUPTED)


@dataclass
class Talk:
    """A conversation: what was said, and how fast."""

    engine: "Engine"
    params: "SamplingParams"
    prompt_lookup: int
    out: TextIO
    system: str | None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from lowbit.runtime.conversation import has_template

        self.template = has_template(self.engine.tokenizer)
        if self.system is not None and not self.template:
            raise InputError("--system: this model has no chat template, so there is no place for it. Leave it out.")
        if not self.template:
            note("This model has no chat template: it continues each text you give it, and remembers none.")
        self.clear()

    def clear(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def turn(self, text: str) -> None:
        """Answer one text, printed as it comes; Ctrl-C ends the answer. Raises InputError before anything is said."""
        if not text.strip():
            raise InputError("the prompt is empty: type some text.")
        start = time.perf_counter()
        tokens = self._tokens(text)
        room = self.engine.context_length - len(tokens)
        params = replace(self.params, max_new_tokens=min(self.params.max_new_tokens or room, max(room, 1)))
        pieces: list[str] = []
        times: list[float] = []
        finish: str | None = None
        try:
            for output in self.engine.outputs(tokens, params, prompt_lookup=self.prompt_lookup):
                times.append(time.perf_counter())
                pieces.append(output.text)
                self.out.write(output.text)
                self.out.flush()
                finish = output.finish
        except KeyboardInterrupt:
            finish = "interrupted"
        self.out.write("\n")
        self.out.flush()
        answer = "".join(pieces)
        if self.template and answer:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.turns.append({
            "prompt": text, "answer": answer, "finish": finish, "prompt_tokens": len(tokens),
            "generated_tokens": len(times), **_speed(start, times),
        })  # fmt: skip
        note(_summary(self.turns[-1]))

    def _tokens(self, text: str) -> list[int]:
        from lowbit.runtime.conversation import encode

        if self.template:
            return self.engine.chat_tokens([*self.messages, {"role": "user", "content": text}])
        return encode(self.engine.tokenizer, text)


def _speed(start: float, times: list[float]) -> dict[str, float | None]:
    """TTFT and the rate after the first token; None where there were too few tokens for it."""
    later = times[-1] - times[0] if len(times) > 1 else 0.0
    return {
        "ttft_s": times[0] - start if times else None,
        "tokens_per_s": (len(times) - 1) / later if later > 0 else None,
    }


def _summary(turn: dict[str, Any]) -> str:
    parts = [f"{turn['prompt_tokens']} + {turn['generated_tokens']} tokens"]
    if turn["ttft_s"] is not None:
        parts.append(f"TTFT {turn['ttft_s'] * 1e3:.0f} ms")
    if turn["tokens_per_s"] is not None:
        parts.append(f"{turn['tokens_per_s']:.1f} tokens/s")
    if turn["finish"] != "stop":
        parts.append("interrupted" if turn["finish"] == "interrupted" else "stopped at the length limit")
    return f"[{', '.join(parts)}]"


def _interactive(talk: Talk) -> None:
    """Ask and answer until the input ends. A text at fault is said and forgotten; the conversation goes on."""
    person = sys.stdin.isatty()
    while True:
        try:
            text = _ask(person)
        except KeyboardInterrupt:
            note("\n(Ctrl-D leaves)")
            continue
        except EOFError:
            return
        if text.strip() == "/clear":
            talk.clear()
        elif text.strip():
            try:
                talk.turn(text)
            except InputError as error:
                print(f"lowbit: {error}", file=sys.stderr)
                if talk.template and talk.messages:
                    note("(/clear forgets the conversation so far and makes room)")


def _ask(person: bool) -> str:
    """A line of the user's: with editing on a terminal, plain otherwise."""
    if person:
        with contextlib.suppress(ImportError):  # where there is none, input() works without line editing
            import_module("readline")
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
