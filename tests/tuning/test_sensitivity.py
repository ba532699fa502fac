"""Sensitivity: two independent ways agree, and both say what really happens to the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lowbit.calibration import load_calibration
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.recipe import Recipe
from lowbit.tuning.sensitivity import Subject, direct, fisher, sensitivity

RTN = Recipe(method="rtn")


@pytest.fixture(scope="module")
def subject(tiny_float32: Path, text_file: Path) -> Subject:
    checkpoint = open_checkpoint(tiny_float32)
    windows = load_calibration(str(text_file), load_tokenizer(checkpoint), 24, 64, 0).tokens
    return Subject(checkpoint, windows)


def test_groups_are_linears_of_one_input(subject: Subject) -> None:
    kinds = [tuple(n.rsplit(".", 1)[1] for n in g.names) for g in subject.groups]
    assert kinds == 2 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert subject.groups[2].weights == 2 * 64 * 128


def test_fisher_is_the_second_order_of_the_direct_kl(subject: Subject) -> None:
    """Scaling a change by c scales the KL by c^2 once it is small; the Fisher score says which KL that is."""
    changes = [subject.round(u, "w4a16-g32", RTN)[0] for u in range(len(subject.groups))]
    small = [{n: 0.25 * d for n, d in c.items()} for c in changes]
    tiny = [{n: 0.125 * d for n, d in c.items()} for c in changes]
    kl = direct(subject, small, windows=24)
    assert kl / direct(subject, tiny, windows=24) == pytest.approx(4 * np.ones(len(kl)), rel=0.2)
    score = np.mean([fisher(subject, small, windows=24, seed=s) for s in range(8)], axis=0)
    assert score.sum() == pytest.approx(kl.sum(), rel=0.25)


def test_both_ways_order_the_groups_alike(subject: Subject) -> None:
    changes = [subject.round(u, "w3a16-g32", RTN)[0] for u in range(len(subject.groups))]
    by_fisher = np.mean([fisher(subject, changes, windows=24, seed=s) for s in range(4)], axis=0)
    assert stats.spearmanr(by_fisher, direct(subject, changes, windows=24)).statistic > 0.8


def test_weights_are_left_as_they_were(subject: Subject) -> None:
    before = {n: m.weight.clone() for g in subject.groups for n, m in ((n, subject.modules[n]) for n in g.names)}
    changes = [subject.round(u, "w2a16-g32", RTN)[0] for u in range(len(subject.groups))]
    direct(subject, changes, windows=2)
    fisher(subject, changes, windows=2)
    assert all(torch.equal(subject.modules[n].weight, w) for n, w in before.items())
    assert not any(p.requires_grad for p in subject.net.parameters())


def test_more_bits_cost_more_and_lose_less(subject: Subject) -> None:
    found = sensitivity(subject, ("w2a16-g32", "w4a16-g32", "w8a16-g32"), "w3a16-g32", RTN, "direct")
    assert (np.diff(found.kl, axis=1) < 0).all()
    assert found.bits[0].tolist() == [
        subject.groups[0].weights * (b + 16 / 32 * 2) for b in (2, 4, 8)
    ]  # float32 scales
