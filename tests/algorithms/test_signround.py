from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.gptq import gptq
from lowbit.algorithms.rtn import rtn
from lowbit.algorithms.signround import Latent, SignRoundSettings, learn, resting_point
from lowbit.errors import InputError
from lowbit.scheme import Scheme, TensorScheme

SETTINGS = SignRoundSettings(iterations=40)
GRIDS = ["w2a16-g32", "w3a16-g32-asym", "w4a16-channel", "w4a16-tensor", "w2a16-g32-midrise", "nf4-g32", "any3-g32"]


def grid(text: str) -> TensorScheme:
    weight = Scheme.parse(text).weight
    assert weight is not None
    return weight


def weights_and_inputs(out: int = 32, width: int = 64, rows: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight (out, width), x (rows, width)) with correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=g))
    x = torch.randn(rows, width, generator=g) * torch.logspace(0.5, -1, width) @ basis
    return torch.randn(out, width, generator=g) / width**0.5, x


def latent(text: str) -> Latent:
    weight, x = weights_and_inputs()
    H = x.T @ x / len(x)
    start, _ = gptq(weight, H, grid(text), SETTINGS, torch.bfloat16)
    return Latent(resting_point(weight, start, H), start, SETTINGS.margin)


@pytest.mark.parametrize("text", GRIDS)
def test_a_latent_begins_as_the_tensor_it_was_given(text: str) -> None:
    found = latent(text)
    assert torch.equal(found.value(), found.start.dequantize())
    assert torch.equal(found.tensor().codes, found.start.codes)


@pytest.mark.parametrize("text", GRIDS)
def test_what_is_learned_is_what_is_stored(text: str) -> None:
    found = latent(text)
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        found.step(torch.randn(found.start.shape, generator=g), 0.1, 0.02)
    result = found.tensor()
    assert not torch.equal(result.codes, found.start.codes)
    assert not torch.equal(result.scale, found.start.scale)
    assert torch.equal(found.value(), result.dequantize())
    scheme = result.scheme
    highest = scheme.qmax if scheme.kind == "int" else 2**scheme.bits - 1
    assert found.lowest <= float(result.codes.min()) <= float(result.codes.max()) <= highest


def test_a_latent_moves_half_a_code_at_most() -> None:
    found = latent("w4a16-channel")
    before = found.u.clone()
    n = 50
    for i in range(n):
        found.step(torch.ones(found.start.shape), (1 - i / n) / n, 0.0)
    assert float((found.u - before).abs().max()) <= 0.5 + 1 / n
    assert float((found.tensor().codes - found.start.codes).abs().max()) == 1


def test_codes_of_gptq_rest_inside_their_cells() -> None:
    """After descent sweeps no single code can be improved, which is to say: every resting point is in its cell."""
    weight, x = weights_and_inputs()
    H = x.T @ x / len(x)
    start, _ = gptq(weight, H, grid("w4a16-channel"), replace(SETTINGS, sweeps=30), torch.bfloat16)
    found = Latent(resting_point(weight, start, H), start, margin=0.0)
    offset = (resting_point(weight, start, H) - found.value()) / found.scale
    inside = (offset.abs() < 0.5001) | (start.codes.abs() >= 7)  # beyond the last code there is no border
    assert float(inside.float().mean()) > 0.99
    assert float(((weight - found.value()) / found.scale).abs().gt(0.5).float().mean()) > 0.1, "unlike the weights"


@pytest.mark.parametrize("text", [text for text in GRIDS if text != "nf4-g32"])  # whose levels are uneven: 6 % only
def test_two_layers_are_rounded_for_what_they_make_together(text: str) -> None:
    """y = C relu(B x), both rounded to nearest at first; the loss is of y, on rows that taught nothing."""
    (b, x), (c, _) = weights_and_inputs(rows=2048), weights_and_inputs(64, 32, seed=1)
    latents = {n: Latent(w, rtn(w, grid(text), torch.bfloat16), 0.0) for n, w in (("b", b), ("c", c))}

    def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        truth = torch.relu(rows @ b.T) @ c.T
        return (torch.relu(rows @ weights["b"].T) @ weights["c"].T - truth).square().mean()

    def now() -> float:
        return float(loss({n: v.value() for n, v in latents.items()}, unseen))

    train, unseen = x[:1536].split(256), x[1536:]
    before = now()
    learn(latents, lambda weights, i: loss(weights, train[i]), len(train), 2, SETTINGS)
    assert now() < 0.8 * before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"scope": "layer"}, "scope=layer: expected 'block' or 'model'"),
        ({"iterations": 0}, "iterations and batch_size are at least 1"),
        ({"margin": 0.6}, "margin=0.6: a cell ends at 0.5"),
    ],
)
def test_settings_that_make_no_sense(words: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SignRoundSettings(**words)  # type: ignore[arg-type]
