"""The block pool against a plain model of it, under random use."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lowbit.runtime.kv_blocks import BlockPool, block_name

BLOCKS, SIZE = 6, 2


class PoolUse(RuleBasedStateMachine):
    """Sequences of a tiny alphabet (so that prefixes meet) come, fill their blocks and go, in any order.

    `content` is what a cache would hold: the tokens up to each block's end that were last written into the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.live: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def start(self, tokens: list[int]) -> None:
        found = self.pool.match(tokens)
        assert len(found) * SIZE < len(tokens)  # the last token is left to compute
        for i, block in enumerate(found):
            assert self.content[block] == tuple(tokens[: (i + 1) * SIZE])  # never another prefix's keys and values
        needed = -(-len(tokens) // SIZE) - len(found)
        if needed > self.pool.available - self.pool.idle_among(found):
            return
        self.pool.adopt(found, len(tokens))
        table, name = list(found), self.pool.name_of(found[-1]) if found else b""
        for start in range(len(found) * SIZE, len(tokens), SIZE):
            block = self.pool.take()
            assert all(block not in other for other in self.live)
            assert block not in table
            table.append(block)
            self.content[block] = tuple(tokens[: start + SIZE])
            if start + SIZE <= len(tokens):
                name = self.pool.seal(block, name, tokens[start : start + SIZE])
        self.live.append(table)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.live:
            self.pool.release(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @invariant()
    def every_user_is_counted_and_the_rest_is_available(self) -> None:
        for block in range(BLOCKS):
            assert self.pool.users(block) == sum(table.count(block) for table in self.live)
        assert self.pool.available == BLOCKS - len({b for table in self.live for b in table})

    def teardown(self) -> None:
        for table in self.live:
            self.pool.release(table)
        assert self.pool.available == BLOCKS
        assert sorted(self.pool.take() for _ in range(BLOCKS)) == list(range(BLOCKS))


PoolUse.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestPoolUse = PoolUse.TestCase


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    found = pool.match(tokens)
    pool.adopt(found, len(tokens))
    table, name = list(found), pool.name_of(found[-1]) if found else b""
    for start in range(len(found) * pool.block_size, len(tokens), pool.block_size):
        table.append(pool.take())
        if start + pool.block_size <= len(tokens):
            name = pool.seal(table[-1], name, tokens[start : start + pool.block_size])
    return table


def test_a_finished_prefix_is_found_again_and_counted() -> None:
    pool = BlockPool(8, 4)
    table = fill(pool, list(range(10)))
    pool.release(table)
    assert pool.match([*range(8), 99]) == table[:2]
    assert pool.match([*range(8)]) == table[:1]  # its last token must be computed
    assert pool.match([1, *range(8)]) == []
    fill(pool, [*range(8), 99])
    assert (pool.query_tokens, pool.hit_tokens) == (19, 8)


def test_the_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, 2)
    old = fill(pool, [1, 1, 1, 1])
    new = fill(pool, [2, 2, 2, 2])
    pool.release(old)
    pool.release(new)
    assert pool.take() == old[1]
    assert pool.match([1, 1, 1, 1, 1]) == old[:1]
    pool.adopt(old[:1], 5)  # used again: now the other is the oldest
    pool.release(old[:1])
    assert [pool.take(), pool.take(), pool.take()] == [new[1], new[0], old[0]]
    with pytest.raises(IndexError, match="in use"):
        pool.take()


def test_a_name_covers_everything_before() -> None:
    first, other = block_name(b"", [1, 2]), block_name(b"", [2, 2])
    assert block_name(first, [3, 4]) != block_name(other, [3, 4])
    assert block_name(b"", [1, 2]) == first


def test_without_reuse_nothing_is_found() -> None:
    pool = BlockPool(4, 2, reuse=False)
    pool.release(fill(pool, [1, 2, 3, 4]))
    assert pool.match([1, 2, 3, 4, 5]) == []
    assert pool.available == 4
