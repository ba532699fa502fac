"""Which block of the key-value cache belongs to whom, and which computed prefixes it still holds.

The cache is cut into blocks of a few tokens, and a sequence owns a table of blocks that need not lie together, so that
no memory is reserved for tokens that may never come (Kwon et al. 2023, "PagedAttention", 4.2). Keys and values depend
only on the tokens before them. A full block is therefore named by the hash of its tokens and of all before:

    name(block i) = sha256(name(block i - 1), tokens of block i)

and a new request whose prompt begins with the same tokens takes those blocks over instead of computing them. A block
that nobody uses keeps its name until its room is needed: the least recently used goes first, and of one sequence the
last block first, because nothing behind a missing block can be reached.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_ROOT = b""


def block_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block from that of the block before it (b"" for the first)."""
    return hashlib.sha256(before + array("i", tokens).tobytes()).digest()


class BlockPool:
    """Reference-counted blocks 0 .. blocks - 1 of `block_size` tokens each.

    `query_tokens` and `hit_tokens` count what was looked up and what was found, for a hit rate.
    """

    def __init__(self, blocks: int, block_size: int, *, reuse: bool = True) -> None:
        self.blocks, self.block_size, self.reuse = blocks, block_size, reuse
        self._users = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))  # unused and unnamed
        self._idle: OrderedDict[int, None] = OrderedDict()  # unused but named, least recently used first
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self.query_tokens = self.hit_tokens = 0

    @property
    def available(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.blocks - self.available

    def users(self, block: int) -> int:
        return self._users[block]

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The cached blocks that begin with these tokens, longest chain first found; takes nothing.

        The last token is never among them: somebody must compute the logits that follow it.
        """
        found: list[int] = []
        name, size = _ROOT, self.block_size
        for start in range(0, (len(tokens) - 1) // size * size if self.reuse else 0, size):
            name = block_name(name, tokens[start : start + size])
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def name_of(self, block: int) -> bytes:
        """The name of a block that `match` gave."""
        return self._name_of[block]

    def adopt(self, found: Sequence[int], tokens: int) -> None:
        """Use blocks that `match` gave, for a prompt of so many tokens."""
        self.query_tokens += tokens
        self.hit_tokens += len(found) * self.block_size
        for block in found:
            self._idle.pop(block, None)
            self._users[block] += 1

    def idle_among(self, found: Sequence[int]) -> int:
        """How many of these blocks count as available now and will not once adopted."""
        return sum(block in self._idle for block in found)

    def take(self) -> int:
        """A block for new tokens; if need be the least recently used one gives up what it holds.

        Raises IndexError if none is available: ask `available` before.
        """
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._name_of.pop(block)]
        else:
            raise IndexError("all blocks of the cache are in use")
        self._users[block] = 1
        return block

    def seal(self, block: int, before: bytes, tokens: Sequence[int]) -> bytes:
        """Name a block whose keys and values are computed and full; the name, for the next block.

        If another block has that name already, this one stays unnamed and serves its sequence alone.
        """
        name = block_name(before, tokens)
        if self.reuse and name not in self._block_of and block not in self._name_of:
            self._block_of[name], self._name_of[block] = block, name
        return name

    def release(self, table: Sequence[int]) -> None:
        """One user fewer for each block of a sequence; the last blocks become the first to go."""
        for block in reversed(table):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._name_of:
                self._idle[block] = None
            else:
                self._free.append(block)
