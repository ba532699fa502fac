import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.gptq import GPTQSettings, column_order, factorize, gptq, refine
from lowbit.algorithms.rtn import rtn
from lowbit.numerics import choose_qparams, quantize
from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor

OUT, IN = 24, 256
PLAIN = GPTQSettings(scale_search=False, sweeps=0, desc_act=False)


def grid(text: str) -> TensorScheme:
    scheme = Scheme.parse(text).weight
    assert scheme is not None
    return scheme


def problem(seed: int = 0, columns: int = IN, rows: int = 1000) -> tuple[Tensor, Tensor]:
    """(weight, H) with strongly correlated inputs: a decaying spectrum in a random basis, and a mean."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=g))
    x = torch.randn(rows, columns, generator=g) * torch.logspace(0.5, -1.5, columns) @ basis
    x = x * torch.rand(columns, generator=g).exp() + 0.1
    return torch.randn(OUT, columns, generator=g) * 0.05, x.T @ x / rows


def loss(weight: Tensor, quantized: QuantizedTensor, H: Tensor) -> float:
    error = (weight - quantized.dequantize()).double()
    return float(((error @ H.double()) * error).sum(1).mean())


def textbook_gptq(weight: Tensor, H: Tensor, scheme: TensorScheme, damp: float, order: list[int]) -> Tensor:
    """Optimal brain quantization in a fixed order, O(n^3) in float64: an explicit inverse that loses a row and a
    column with every rounded weight. No Cholesky factor, no lazy blocks. Returns the codes."""
    scale, zero = choose_qparams(weight, scheme, torch.bfloat16)
    W, H = weight.double(), H.double()
    Hinv = torch.linalg.inv(H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.double))
    codes = torch.empty_like(W)
    left = list(order)
    for j in order:
        left.remove(j)
        k = j * scale.shape[1] // W.shape[1]
        s, z = scale[:, k].double(), 0 if zero is None else zero[:, k].double()
        codes[:, j] = ((W[:, j] / s).round() + z).clamp(scheme.qmin, scheme.qmax)
        error = (W[:, j] - (codes[:, j] - z) * s) / Hinv[j, j]
        W[:, left] -= error[:, None] * Hinv[j, left]
        Hinv = Hinv - torch.outer(Hinv[:, j], Hinv[j]) / Hinv[j, j]
    return codes


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("text", ["w2a16-g64", "w4a16-g32", "w4a16-g128-asym", "w3a16-channel", "w4a16-tensor"])
def test_codes_are_the_textbooks(text: str, desc_act: bool) -> None:
    scheme = grid(text)
    weight, H = problem()
    mine, used = gptq(weight, H, scheme, replace(PLAIN, desc_act=desc_act), torch.bfloat16)
    order = column_order(H.diagonal(), scheme, desc_act).tolist()
    theirs = textbook_gptq(weight, H, scheme, 0.01, order)
    assert used == 0.01
    assert float((mine.codes != theirs).double().mean()) < 0.01  # float32 against float64: a few ties, and what follows
    assert float((mine.codes - theirs).abs().max()) <= 1


@pytest.mark.parametrize("block_size", [1, 32, 100, 1000])
def test_lazy_blocks_change_nothing(block_size: int) -> None:
    weight, H = problem()
    scheme = grid("w4a16-channel")
    settings = replace(PLAIN, block_size=block_size)
    mine, _ = gptq(weight, H, scheme, settings, torch.bfloat16)
    whole, _ = gptq(weight, H, scheme, PLAIN, torch.bfloat16)
    assert float((mine.codes != whole.codes).double().mean()) < 0.01


@pytest.mark.parametrize("asym", ["", "-asym"])
@pytest.mark.parametrize("where", ["-g64", "-channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_loss_is_below_rtns_on_correlated_inputs(bits: int, where: str, asym: str) -> None:
    scheme = grid(f"w{bits}a16{where}{asym}")
    for seed in range(2):
        weight, H = problem(seed)
        quantized, _ = gptq(weight, H, scheme, GPTQSettings(), torch.bfloat16)
        mine = loss(weight, quantized, H)
        assert mine < 0.9 * loss(weight, rtn(weight, scheme, torch.bfloat16), H)
        assert mine < 0.9 * loss(weight, rtn(weight, scheme, torch.bfloat16, scale_search=True), H)


@pytest.mark.parametrize("text", ["fp8", "fp8-tensor", "w8a8", "w8a16-tensor", "fp8-block"])
def test_loss_is_not_above_rtns_for_the_other_schemes(text: str) -> None:
    weight, H = problem()
    weight = torch.cat([weight] * 16)[:256]  # whole 128 x 128 blocks
    scheme = grid(text)
    quantized, _ = gptq(weight, H, scheme, GPTQSettings(), torch.bfloat16)
    assert loss(weight, quantized, H) < loss(weight, rtn(weight, scheme, torch.bfloat16), H)


@pytest.mark.parametrize("text", ["w2a16-g32", "w3a16-g64-asym", "w4a16-channel", "w4a16-tensor", "w8a8", "fp8"])
@pytest.mark.parametrize("start", ["rtn", "gptq", "noise"])
def test_refine_never_raises_the_loss(text: str, start: str) -> None:
    scheme = grid(text)
    weight, H = problem(3)
    H.diagonal().add_(1e-3 * H.diagonal().mean())
    quantized = rtn(weight, scheme, torch.bfloat16)
    if start == "gptq":
        quantized, _ = gptq(weight, H, scheme, PLAIN, torch.bfloat16)
    if start == "noise":
        noisy = weight + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        codes = quantize(noisy, quantized.scale, quantized.zero_point, scheme)
        quantized = replace(quantized, codes=codes)
    losses = [loss(weight, quantized, H)]
    for _ in range(4):
        quantized = refine(weight, quantized, H)
        losses.append(loss(weight, quantized, H))
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))
    if start == "noise":
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("text", ["w3a16-g64", "w4a16-g128-asym", "w4a16-channel", "fp8"])
def test_slopes_in_bfloat16_find_what_those_in_float32_find(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, H = problem(4, columns=1024, rows=4000)
    start, _ = gptq(weight, H, grid(text), GPTQSettings(sweeps=0), torch.bfloat16)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(sys.modules["lowbit.algorithms.gptq"], "compute_dtype", lambda dtype=dtype: dtype)
        losses[dtype] = loss(weight, refine(weight, start, H, 2), H)
    gained = loss(weight, start, H) - losses[torch.float32]
    assert losses[torch.bfloat16] < losses[torch.float32] + 0.1 * gained


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("text", ["w3a16-g64", "w4a16-g128-asym", "w4a16-channel", "fp8"])
def test_products_in_bfloat16_cost_nothing(text: str, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another path to a loss as low: 1 % up or down for one matrix, whatever changes the last bits. So it is where
    inputs with a mean of 30 standard deviations make large repairs cancel."""
    ratios = []
    for seed in range(4):
        weight, H = problem(seed, columns=1024, rows=4000)
        H = H + mean**2 * H.diagonal().mean()
        losses = {}
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(sys.modules["lowbit.algorithms.gptq"], "compute_dtype", lambda dtype=dtype: dtype)
            losses[dtype] = loss(weight, gptq(weight, H, grid(text), GPTQSettings(), torch.bfloat16)[0], H)
        ratios.append(losses[torch.bfloat16] / losses[torch.float32])
    assert sum(ratios) / len(ratios) < 1.02


def test_slopes_that_cancel_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mean a thousand times the spread, what is left of slopes is beyond bfloat16."""
    module = sys.modules["lowbit.algorithms.gptq"]
    x = 1000 + torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    H = x.T @ x / len(x)
    quantized, _ = gptq(weight, H, grid("w3a16-g64"), GPTQSettings(sweeps=0), torch.bfloat16)
    losses = {}
    for dtype, off in ((torch.float32, 0.1), (torch.bfloat16, 0.1), (torch.bfloat16, torch.inf)):
        monkeypatch.setattr(module, "compute_dtype", lambda dtype=dtype: dtype)
        monkeypatch.setattr(module, "_OFF", off)
        losses[dtype, off] = loss(weight, refine(weight, quantized, H, 2), H)
    assert losses[torch.bfloat16, 0.1] < 1.1 * losses[torch.float32, 0.1]
    assert losses[torch.bfloat16, torch.inf] > 1.3 * losses[torch.float32, 0.1]  # what the sample is for


def test_refine_leaves_its_arguments_alone() -> None:
    weight, H = problem()
    quantized = rtn(weight, grid("w3a16-g64"), torch.bfloat16)
    kept = [t.clone() for t in (weight, H, quantized.codes, quantized.scale)]
    gptq(weight, H, grid("w3a16-g64"), GPTQSettings(), torch.bfloat16)
    refine(weight, quantized, H)
    for before, after in zip(kept, (weight, H, quantized.codes, quantized.scale), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("text", ["w2a16-g32", "w3a16-g64-asym", "w4a16-g32", "w4a16-channel", "w8a16-g64", "w8a8"])
def test_exactly_representable_weights_come_back(text: str) -> None:
    scheme = grid(text)
    _, H = problem()
    g = torch.Generator().manual_seed(5)
    codes = torch.randint(int(scheme.qmin), int(scheme.qmax) + 1, (OUT, IN), generator=g).to(torch.int8)
    codes[:, ::32] = int(scheme.qmin)
    codes[:, 1::32] = int(scheme.qmax)
    groups = IN // scheme.group_size if scheme.group_size else 1
    scale = torch.rand(OUT, groups, generator=g).bfloat16() + 0.01
    if scheme.symmetric and scheme.bits <= 4:
        scale[::2] *= -1
    zero = None if scheme.symmetric else torch.randint(-4, 4, (OUT, groups), generator=g).to(torch.int8)
    weight = QuantizedTensor(codes, scale, zero, scheme).dequantize()
    quantized, _ = gptq(weight, H, scheme, GPTQSettings(), torch.bfloat16)
    assert torch.equal(quantized.dequantize(), weight)


def test_columns_no_token_reached_are_rounded_to_nearest() -> None:
    weight, H = problem()
    dead = torch.tensor([0, 17, 64, 65, 255])
    H[dead], H[:, dead] = 0, 0
    scheme = grid("w4a16-g32")
    quantized, used = gptq(weight, H, scheme, PLAIN, torch.bfloat16)
    assert used == 0.01
    assert torch.equal(quantized.codes[:, dead], rtn(weight, scheme, torch.bfloat16).codes[:, dead])
    full, _ = gptq(weight, H, scheme, GPTQSettings(), torch.bfloat16)
    step = full.scale.float().abs().repeat_interleave(32, 1)
    inside = weight.abs() <= 7 * step
    error = (full.dequantize() - weight).abs()
    assert bool((error <= step * 0.501)[:, dead][inside[:, dead]].all())


def test_no_column_reached_is_rtn() -> None:
    weight, _ = problem()
    scheme = grid("w4a16-g32")
    quantized, _ = gptq(weight, torch.zeros(IN, IN), scheme, PLAIN, torch.bfloat16)
    assert torch.equal(quantized.codes, rtn(weight, scheme, torch.bfloat16).codes)


def test_singular_hessian_raises_the_dampening_and_says_so() -> None:
    weight, H = problem(rows=40)  # rank 40 of 256
    scheme = grid("w4a16-g32")
    quantized, used = gptq(weight, H, scheme, GPTQSettings(dampening_frac=0.0), torch.bfloat16)
    assert 1e-4 <= used <= 1
    assert loss(weight, quantized, H) < loss(weight, rtn(weight, scheme, torch.bfloat16), H)


def test_dampening_climbs_in_tens_until_it_is_enough() -> None:
    H = torch.eye(8)
    H[0, 0] = -0.05  # needs lambda > 0.05
    H = H + 0.0
    found = factorize(H, 1e-3)
    assert found.dampening_frac == pytest.approx(0.1)
    damped = H + found.dampening_frac * H.diagonal().mean() * torch.eye(8)
    assert torch.allclose(found.N * found.D @ found.N.T, damped, atol=1e-6)


def test_the_factor_is_triangular_in_the_order_asked_for() -> None:
    _, H = problem(5)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    found = factorize(H, 0.01, order)
    assert torch.equal(found.N, found.N.triu())
    assert bool((found.N.diagonal() == 1).all())
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(IN)
    assert torch.allclose(found.N * found.D @ found.N.T, damped[order][:, order], rtol=1e-4, atol=1e-4)


def test_hopeless_hessians_are_value_errors() -> None:
    weight, H = problem()
    with pytest.raises(ValueError, match="not positive definite even with dampening_frac 1000"):
        gptq(weight, H - 1e6 * torch.eye(IN), grid("w4a16-g32"), GPTQSettings(), torch.bfloat16)
    for value in (torch.nan, torch.inf):
        bad = H.clone()
        bad[3, 5] = value
        with pytest.raises(ValueError, match="entries that are not finite"):
            gptq(weight, bad, grid("w4a16-g32"), GPTQSettings(), torch.bfloat16)


def test_activation_order_keeps_groups_together() -> None:
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(0))
    order = column_order(diagonal, grid("w4a16-g16"), desc_act=True)
    assert sorted(order.tolist()) == list(range(64))
    blocks = order.reshape(4, 16)
    assert bool((blocks // 16 == blocks[:, :1] // 16).all())
    assert bool((diagonal[blocks].diff(dim=1) <= 0).all())
    assert bool((diagonal[blocks].amax(1).diff() <= 0).all())
    channel = column_order(diagonal, grid("w4a16-channel"), desc_act=True)
    assert torch.equal(channel, torch.argsort(diagonal, descending=True))
