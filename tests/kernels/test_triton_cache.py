"""The paged cache and its attention against their twins; CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lowbit.errors import InputError
from lowbit.kernels import reference
from lowbit.kernels.triton import PLACE, graphs, ops, twins

pytest.importorskip("triton", minversion="3.9" if PLACE == "cpu" else "3.6", reason="interpreter: Triton 3.9 or newer")

from lowbit.kernels.triton import kv
from lowbit.kernels.triton.fp8 import supported

Cache = tuple[Tensor, Tensor, Tensor, Tensor]
E4M3 = torch.float8_e4m3fn
needs_fp8 = pytest.mark.skipif(not supported(torch.device(PLACE)), reason="this GPU has no FP8")
TYPES = [torch.int8, pytest.param(E4M3, marks=needs_fp8)]
# heads, kv_heads, dim, page, softcap, window
CASES = [(8, 2, 64, 16, 0.0, 0), (4, 4, 80, 16, 30.0, 20), (6, 1, 128, 32, 0.0, 100), (2, 1, 32, 24, 5.0, 0)]


def empty(pages: int, kv_heads: int, page: int, dim: int, dtype: torch.dtype) -> Cache:
    codes, scales = torch.zeros(pages, kv_heads, page, dim).to(dtype), torch.zeros(pages, kv_heads, page)
    return codes, codes.clone(), scales, scales.clone()


def filled(lengths: list[int], kv_heads: int, dim: int, page: int, dtype: torch.dtype) -> tuple[Cache, Tensor]:
    """A cache of random contexts by the twin's store, in shuffled pages, and the page table."""
    most = -(-max(lengths) // page) + 1
    table = torch.randperm(len(lengths) * most).view(len(lengths), most).to(torch.int32)
    cache = empty(len(lengths) * most, kv_heads, page, dim, dtype)
    for b, length in enumerate(lengths):
        t = torch.arange(length)
        k, v = torch.randn(2, length, kv_heads, dim)
        twins.store(k, v * 10.0 ** -(t % 5).view(-1, 1, 1), cache, table[b, t // page].long() * page + t % page)
    return cache, table


def moved(cache: Cache) -> Cache:
    a, b, c, d = (t.to(PLACE) for t in cache)
    return a, b, c, d


@pytest.mark.parametrize("dtype", TYPES, ids=["int8", "fp8"])
@pytest.mark.parametrize("dim", [64, 80])
def test_storing_is_its_twin_exactly(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 7, 2, dim).bfloat16()
    k[1], v[2] = 0, v[2] * 1e30
    slots = torch.tensor([5, 40, -1, 0, 63, 17, 18])  # -1: padding, stored nowhere
    expected, got = empty(4, 2, 16, dim, dtype), moved(empty(4, 2, 16, dim, dtype))
    twins.store(k, v, expected, slots)
    kv.store(k.to(PLACE), v.to(PLACE), got, slots.to(PLACE))
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.cpu().float(), theirs.float())
    assert (expected[2] > 0).sum() == 5 * 2  # five slots with keys that are not zero, two heads


@pytest.mark.parametrize("dtype", TYPES, ids=["int8", "fp8"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page", "softcap", "window"), CASES)
def test_attention_is_its_twin(
    heads: int, kv_heads: int, dim: int, page: int, softcap: float, window: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cache, table = filled([1, 70, 0, 129], kv_heads, dim, page, dtype)
    lengths = torch.tensor([1, 70, 0, 129], dtype=torch.int32)
    for q_type in (torch.float16, torch.bfloat16):
        q = torch.randn(4, heads, dim).to(q_type)
        expected = twins.attention(q.double(), cache, table, lengths, dim**-0.5, softcap, window)
        for splits in (1, 3):
            got = kv.attention(
                q.to(PLACE), moved(cache), table.to(PLACE), lengths.to(PLACE), dim**-0.5, softcap, window, splits,
                torch.float32,
            ).cpu()  # fmt: skip
            assert (got[2] == 0).all()
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-3)


def test_attention_over_the_cache_is_attention_over_its_values() -> None:
    """The paged twin against `reference.attention`, which rounds keys and values to int8 in its own way."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 50, 2, 32)
    cache, slots = empty(4, 2, 16, 32, torch.int8), torch.arange(50)
    twins.store(k, v, cache, slots)
    q, table = torch.randn(1, 4, 32), torch.arange(4, dtype=torch.int32)[None]
    got = twins.attention(q, cache, table, torch.tensor([50], dtype=torch.int32), 0.2, 0.0, 0)
    torch.testing.assert_close(got, reference.attention(q, k, v, "int8", 49, 0.2), rtol=1e-5, atol=1e-5)


def test_attention_survives_extremes() -> None:
    """Scores of ten thousand, values of every size up to 1e30 and zeros: finite, and the best key wins."""
    k = torch.zeros(70, 1, 16)
    k[33] = 100.0
    v = torch.zeros(70, 1, 16)
    v[33], v[34] = 2.0, 1e30
    cache, slots = empty(5, 1, 16, 16, torch.int8), torch.arange(70)
    twins.store(k, v, cache, slots)
    table, lengths = torch.arange(5, dtype=torch.int32)[None], torch.tensor([70], dtype=torch.int32)
    q = torch.full((1, 2, 16), 100.0).half()
    q[0, 1] = -100.0
    got = kv.attention(
        q.to(PLACE), moved(cache), table.to(PLACE), lengths.to(PLACE), 1.0, 0.0, 0, 2, torch.float32
    ).cpu()
    assert torch.isfinite(got).all()
    # Values that share a tile with one of 1e30 share its scale: 2.0 is lost beside it, never the other way.
    assert (got[0, 0].abs() <= 2.0).all()


def test_bad_queries_are_refused() -> None:
    cache = moved(empty(1, 2, 16, 16, torch.int8))
    table, lengths = torch.zeros(1, 1, dtype=torch.int32, device=PLACE), torch.ones(1, dtype=torch.int32, device=PLACE)
    with pytest.raises(ValueError, match="fp16 or bf16"):
        kv.attention(torch.zeros(1, 2, 16, device=PLACE), cache, table, lengths, 1.0)
    with pytest.raises(ValueError, match="no multiple"):
        kv.attention(torch.zeros(1, 3, 16, device=PLACE).half(), cache, table, lengths, 1.0)


def test_operators() -> None:
    torch.manual_seed(0)
    cache, slots = empty(3, 2, 16, 32, torch.int8), torch.arange(9)
    k, v = torch.randn(2, 9, 2, 32)
    opcheck(ops.kv_store, (k, v, *cache, slots))
    ops.kv_store(k, v, *cache, slots)
    q, table, lengths = torch.randn(1, 4, 32), torch.zeros(1, 3, dtype=torch.int32), torch.tensor([9])
    opcheck(ops.paged_attention, (q, *cache, table, lengths, 0.2, 0.0, 0))
    assert torch.equal(
        ops.paged_attention(q, *cache, table, lengths, 0.2, 0.0, 0),
        twins.attention(q, cache, table, lengths, 0.2, 0.0, 0),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_without_a_gpu_say_so() -> None:
    with pytest.raises(InputError, match="need a CUDA GPU"):
        graphs.CapturedStep(torch.neg, torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_step_is_the_step() -> None:
    """Stores, attends and multiplies through the operators, replayed with other inputs than it was captured with."""
    torch.manual_seed(0)
    cache, table = filled([40, 90], 2, 64, 16, torch.int8)
    on_gpu, table = tuple(t.cuda() for t in cache), table.cuda()

    def step(q: Tensor, lengths: Tensor) -> Tensor:
        return ops.paged_attention(q, *on_gpu, table, lengths, 0.125, 0.0, 0)

    queries = torch.randn(3, 2, 8, 64, device="cuda").half()
    lengths = torch.tensor([[40, 90], [39, 1], [7, 64]], dtype=torch.int32, device="cuda")
    captured = graphs.CapturedStep(step, queries[0], lengths[0])
    for q, at in zip(queries, lengths, strict=True):
        assert torch.equal(captured(q, at), step(q, at))
    with pytest.raises(ValueError, match="captured for"):
        captured(queries[0][:1], lengths[0])
