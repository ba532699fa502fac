"""Perplexity, KL divergence and agreement, window by window.

The text is tokenized once without special tokens and cut into non-overlapping windows; every token but a window's
first is predicted (the convention of the GPTQ paper). All from float32 log-softmax, natural logarithm.

A server may report only its likeliest tokens. What it leaves for all others is then taken to be spread as in the
reference, so that they add sum_rest p log(p_rest / q_rest) to the divergence, which is exact for the sets {each
reported token, all others} and no more than the true one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.console import track
from lowbit.errors import InputError

Logits = Callable[[Tensor], Tensor]  # token ids (batch, tokens) -> float32 logits (batch, tokens, vocabulary)
_BATCH_BYTES = 128e6


@dataclass(frozen=True)
class Scores:
    """One model over the windows; each array has one entry a window."""

    nll: np.ndarray  # mean negative log-likelihood
    kl: np.ndarray  # mean KL(reference || model), nats
    agreement: np.ndarray  # share of positions with the reference's argmax
    right: np.ndarray  # bool (windows, positions): the likeliest token is the one that follows in the text

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean()))

    @staticmethod
    def stderr(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def cut_windows(ids: np.ndarray, seq_len: int, source: str) -> Tensor:
    """Token ids -> (windows, seq_len) int64, remainder dropped. Raises InputError if not even one window fits."""
    count = len(ids) // seq_len
    if seq_len < 2:
        raise InputError(f"--seq-len must be at least 2 (one token to see, one to predict), got {seq_len}.")
    if count < 1:
        raise InputError(
            f"{source}: {len(ids)} tokens do not fill one window of {seq_len}. Give more text or lower --seq-len."
        )
    return torch.from_numpy(ids[: count * seq_len].reshape(count, seq_len).astype(np.int64))


def measure(reference: Logits, models: Sequence[Logits], windows: Tensor, vocabulary: int) -> list[Scores]:
    """Scores of the reference itself and of each model, all on the same windows in one pass."""
    batch = max(1, int(_BATCH_BYTES / (windows.shape[1] * vocabulary * 4)))
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in range(len(models) + 1)]
    batches = windows.split(batch)
    for tokens in track(batches, "evaluating", len(batches)):
        truth = reference(tokens)[:, :-1].log_softmax(-1)
        best, likely = truth.argmax(-1), truth.exp()
        for n, logits in enumerate([None, *models]):
            own = truth if logits is None else _completed(logits(tokens)[:, :-1], truth).log_softmax(-1)
            nll = -own.gather(-1, tokens[:, 1:, None]).squeeze(-1)
            kl = (likely * (truth - own)).sum(-1)
            top = own.argmax(-1)
            agreement = (top == best).double().mean(1)
            rows[n].append((nll.double().mean(1), kl.double().mean(1), agreement, top == tokens[:, 1:]))
    return [Scores(*(torch.cat(column).numpy() for column in zip(*parts, strict=True))) for parts in rows]


def _completed(own: Tensor, truth: Tensor) -> Tensor:
    """Log-probabilities of which some are -inf (not reported), these filled in; anything else as it is."""
    unknown = own == -torch.inf
    if not bool(unknown.any()):
        return own
    left = (1 - own.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    hidden = truth.where(unknown, -torch.inf)
    return torch.where(unknown, left + hidden - hidden.logsumexp(-1, keepdim=True), own)
