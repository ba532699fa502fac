from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.gptq import gptq
from lowbit.algorithms.signround import Latent, SignRoundSettings, learn
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
    start, _ = gptq(weight, x.T @ x / len(x), grid(text), SETTINGS, torch.bfloat16)
    return Latent(weight, start, SETTINGS.margin)


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


@pytest.mark.parametrize("text", GRIDS)
def test_two_layers_together_lose_less_than_each_for_itself(text: str) -> None:
    """gptq rounds B for its own input's sake; what counts is C f(B x), which learning sees, on rows it never saw."""
    (b, x), (c, _) = weights_and_inputs(rows=2048), weights_and_inputs(64, 32, seed=1)
    inner = torch.relu(x @ b.T)
    starts = [gptq(w, h.T @ h / len(h), grid(text), SETTINGS, torch.bfloat16)[0] for w, h in ((b, x), (c, inner))]
    latents = {n: Latent(w, s, SETTINGS.margin) for n, w, s in zip("bc", (b, c), starts, strict=True)}

    def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        truth = torch.relu(rows @ b.T) @ c.T
        return (torch.relu(rows @ weights["b"].T) @ weights["c"].T - truth).square().mean()

    train, unseen = x[:1536].split(256), x[1536:]
    before = float(loss({n: v.value() for n, v in latents.items()}, unseen))
    learn(latents, lambda weights, i: loss(weights, train[i]), len(train), 2, SETTINGS)
    after = float(loss({n: v.value() for n, v in latents.items()}, unseen))
    assert after < 0.9 * before


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
