"""Sampling is transformers' chain of processors; greedy is argmax; draws follow the distribution."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import logits_process as hf

from lowbit.errors import InputError, LowbitError
from lowbit.runtime.sampling import (
    SamplingParams,
    distribution,
    new_rng,
    penalize,
    penalize_counts,
    sample,
    sampling_params,
    with_log_probabilities,
)

VOCAB = 500


def row(seed: int, spread: float = 3.0, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def by_transformers(scores: torch.Tensor, history: list[int], p: SamplingParams) -> torch.Tensor:
    """Probabilities (vocabulary,) after the processors that transformers would apply, in its order."""
    chain: list[Any] = []
    if p.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    chain.append(hf.TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        chain.append(hf.TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        chain.append(hf.TopPLogitsWarper(p.top_p))
    if p.min_p:
        chain.append(hf.MinPLogitsWarper(p.min_p))
    scores = scores[None].clone()
    for processor in chain:
        scores = processor(torch.tensor([history]), scores)
    return scores[0].softmax(0)


CASES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.001},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    params = SamplingParams(**({"temperature": 1.0} | options))
    for seed in range(20):
        scores, history = row(seed), torch.randint(0, VOCAB, (30,)).tolist()
        tokens, p = distribution(penalize(scores, history, params.repetition_penalty), params)
        expected = by_transformers(scores, history, params)
        assert set(tokens.tolist()) == set(expected.nonzero()[:, 0].tolist())
        torch.testing.assert_close(p, expected[tokens].double(), rtol=1e-5, atol=1e-9)
        assert float(p.sum()) == pytest.approx(1)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}])
def test_equal_logits_are_all_treated_as_transformers_does(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.0, **options)
    scores = torch.zeros(8)
    kept = (by_transformers(scores, [0], params) > 0).sum()
    assert len(distribution(scores, params)[0]) == kept


def test_draws_have_the_right_frequencies() -> None:
    """Chi-square over 5000 draws; a true distribution fails this seed's test once in a thousand at most."""
    params = SamplingParams(temperature=0.9, top_k=12, top_p=0.95, min_p=0.01)
    scores, rng, draws = row(3, 1.5, 30), new_rng(0), 5_000
    expected = by_transformers(scores, [], params)
    counts = torch.zeros(30)
    for _ in range(draws):
        counts[sample(scores, [], params, rng).token] += 1
    support = expected > 0
    assert counts[~support].sum() == 0
    assert chisquare(counts[support], (expected[support] / expected[support].sum()) * draws).pvalue > 1e-3


def test_greedy_is_argmax_and_needs_no_random_numbers() -> None:
    rng = new_rng(1)
    before = rng.bit_generator.state
    for seed in range(50):
        scores = row(seed)
        assert sample(scores, [], SamplingParams(), rng).token == int(scores.argmax())
    assert rng.bit_generator.state == before
    assert sample(torch.tensor([1.0, 7.0, 7.0]), [], SamplingParams(), rng).token == 1  # the first of equals


def test_presence_and_frequency_are_openai_s_formula() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counted over the answer and not over the prompt."""
    prompt, answer = [1, 2, 2, 3], [2, 5, 5, 5, 7]
    for presence, frequency in [(0.7, 0.0), (0.0, 0.4), (-1.5, 2.0)]:
        scores = row(11, size=10)
        expected = scores.clone()
        for j in range(10):
            c = answer.count(j)
            expected[j] -= c * frequency + (c > 0) * presence
        torch.testing.assert_close(penalize_counts(scores, answer, presence, frequency), expected)
        params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
        chosen = sample(scores, prompt + answer, params, new_rng(0), len(prompt)).token
        assert chosen == int(expected.argmax())


def test_a_frequency_penalty_ends_a_loop() -> None:
    """Logits that never change: greedy repeats one token, the penalty goes round."""
    scores, tokens = torch.tensor([3.0, 2.9, 2.8, -9.0]), [3]
    for _ in range(9):
        tokens.append(sample(scores, tokens, SamplingParams(frequency_penalty=1.0), new_rng(0), 1).token)
    assert sorted(tokens[1:]) == [0] * 3 + [1] * 3 + [2] * 3


def test_greedy_with_a_penalty_is_that_of_transformers() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    for seed in range(20):
        scores = row(seed)
        history = scores.topk(5).indices.tolist() * 2  # seen twice, penalized once
        expected = hf.RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([history]), scores[None].clone())
        assert sample(scores, history, params, new_rng(0)).token == int(expected.argmax())


def test_the_seed_decides() -> None:
    params = SamplingParams(temperature=1.0)

    def draws(seed: int) -> list[int]:
        rng = new_rng(seed)
        return [sample(row(i), [], params, rng).token for i in range(20)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)


def test_log_probabilities_are_the_models_whatever_is_filtered() -> None:
    scores = row(2)
    choice = sample(scores, [], SamplingParams(temperature=0.3, top_k=2, logprobs=4), new_rng(0))
    logs = scores.log_softmax(0)
    assert choice.logprob == float(logs[choice.token])
    assert [t for t, _ in choice.top] == logs.topk(4).indices.tolist()
    assert [v for _, v in choice.top] == logs.topk(4).values.tolist()
    assert len(with_log_probabilities(row(0, size=3)[None], [0], 100)[0].top) == 3


def test_no_temperature_overflows() -> None:
    for temperature in (1e-30, 1e-6, 1e30):
        choice = sample(row(0, 1e4), [], SamplingParams(temperature=temperature, logprobs=1), new_rng(0))
        assert choice.logprob is not None
    assert sample(row(0), [], SamplingParams(temperature=1e-30), new_rng(0)).token == int(row(0).argmax())


def test_nan_logits_are_refused() -> None:
    scores = row(0)
    scores[3] = float("nan")
    with pytest.raises(LowbitError, match="NaN"):
        sample(scores, [], SamplingParams(temperature=1.0), new_rng(0))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "hot"},
        {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0},
        {"presence_penalty": 2.1}, {"frequency_penalty": float("nan")},
        {"seed": -1}, {"max_new_tokens": 0}, {"stop": ("",)}, {"stop_token_ids": (-1,)}, {"logprobs": 101},
        {"logprobs": True},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} is .*expected"):
        SamplingParams(**options)


def test_options_by_name() -> None:
    assert sampling_params(SamplingParams(top_k=3), {"top_p": 0.5}) == SamplingParams(top_k=3, top_p=0.5)
    assert SamplingParams(stop="end").stop == ("end",)
    with pytest.raises(InputError, match=r"'temprature'. Did you mean temperature"):
        sampling_params(None, {"temprature": 1.0})
