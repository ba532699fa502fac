"""lowbit's engines as a model of EleutherAI's lm-evaluation-harness, which brings the tasks.

The harness asks for three things: log p(continuation | context) and whether greedy decoding would have written it; the
log-likelihood of a whole text; a continuation up to a stop string. Requests are answered in the order of their tokens,
so that the choices of one question find its context in the cache (Engine.next_logits).

Needs the extra `lowbit[tasks]`; imported where tasks are run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from lowbit.console import track
from lowbit.runtime.base import Engine
from lowbit.runtime.sampling import SamplingParams

MOST_NEW_TOKENS = 256  # where a task does not say

Encoded = tuple[Any, list[int], list[int]]  # (the texts, context, continuation)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers with `engine`; `tokenizer` may be the original's, where the engine has none of its own."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, tokenizer
        self.max_length = engine.context_length

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.checkpoint.name)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_words: Any) -> list[int]:
        begins = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        special = not begins if add_special_tokens is None else add_special_tokens
        return [int(t) for t in self.tokenizer.encode(string, add_special_tokens=special)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_words: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for i in track(order, "tasks: likelihoods", len(order)):
            answers[i] = self._score(requests[i][1], requests[i][2])
        return answers

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """(log-likelihood in nats, greedy?) of the continuation; the context loses its beginning if all is too long."""
        if not continuation:
            return 0.0, True
        read = (context + continuation)[-(self.max_length + 1) : -1]
        wanted = torch.tensor(continuation[-len(read) :])
        self.engine.reserve(len(read))
        logits, best = self.engine.next_logits(read, len(wanted), True)
        assert logits is not None
        likely = logits.log_softmax(-1).gather(-1, wanted[:, None])
        return float(likely.double().sum()), best == wanted.tolist()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Each text's own log-likelihood, every token predicted once, in windows of the model's context."""
        found = []
        for (text,) in track([r.args for r in requests], "tasks: texts", len(requests)):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            found.append(sum(self._score(*utils.make_disjoint_window(w))[0] for w in windows))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: str(requests[i].args[0]))
        for i in track(order, "tasks: answers", len(order)):
            context, words = requests[i].args
            answers[i] = self._answer(context, normalize_gen_kwargs(words, MOST_NEW_TOKENS))
        return answers

    def _answer(self, context: str, words: dict[str, Any]) -> str:
        most = min(int(words["max_gen_toks"]), self.max_length - 1)
        tokens = self.tok_encode(context)[-(self.max_length - most) :]
        params = SamplingParams(
            temperature=float(words.get("temperature") or 0.0), top_p=float(words.get("top_p", 1.0)),
            top_k=int(words.get("top_k", 0)), max_new_tokens=most, stop=tuple(s for s in words["until"] if s), seed=0,
        )  # fmt: skip
        return self.engine.generate(tokens or [self.prefix_token_id], params)
