"""Which beginnings of prompts are in the prefix cache, and where.

A beginning is cut into blocks of tokens. The name of a block is a hash of all tokens up to its end,
so equal names mean equal keys and values.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np


class Prefixes:
    """A table from the names of blocks to places in a pool; the least recently used one goes."""

    def __init__(self, block: int, places: int):
        """
        Args:
          block: tokens of a block.
          places: how many blocks the pool holds.
        """
        self.block = block
        self._places = places
        self._found: OrderedDict[bytes, int] = OrderedDict()  # the last one was used last

    def __len__(self) -> int:
        return len(self._found)

    def names(self, prompt: Sequence[int]) -> list[bytes]:
        """The names of the whole blocks of a prompt.

        The prompt's last token is in none of them: it has to be read for the logits after it.
        """
        return list(self._names(np.asarray(prompt, np.int32)))

    def _names(self, prompt: np.ndarray) -> Iterator[bytes]:
        digest = b""
        for end in range(self.block, len(prompt), self.block):
            part = prompt[end - self.block : end].tobytes()
            digest = hashlib.blake2b(digest + part, digest_size=16).digest()
            yield digest

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The places of the longest beginning that is in the pool, block by block."""
        places: list[int] = []
        for name in names:
            if name not in self._found:
                break
            places.append(self._found[name])
        # A beginning is worth more than what follows it: it goes last.
        for name in reversed(names[: len(places)]):
            self._found.move_to_end(name)
        return places

    def add(self, name: bytes) -> int | None:
        """The place for a new block; None if there is one already, or no pool."""
        if name in self._found or not self._places:
            return None
        place = len(self._found)
        if place == self._places:
            _, place = self._found.popitem(last=False)
        self._found[name] = place
        return place

    def clear(self) -> None:
        """Forgets all blocks."""
        self._found.clear()
