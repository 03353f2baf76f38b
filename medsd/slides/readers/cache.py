"""Decoded tiles kept for the next read, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict

from medsd.slides.readers.base import RGB

Key = tuple[str, int, int]

DEFAULT_BYTES = 128 * 2**20
"""Two rows of 256 px tiles of a slide 80,000 px wide."""


class TileCache:
    """Tiles by key, the least recently used out first; shared by threads, and by slides where wanted.

    Args:
        max_bytes: bound on the pixels kept. A tile that alone is larger is not kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._tiles: OrderedDict[Key, RGB] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> RGB | None:
        """The tile kept under `key` (file, level, number), or None."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            return tile

    def put(self, key: Key, tile: RGB) -> None:
        """Keep `tile`; nobody may write to it from now on."""
        if tile.nbytes > self.max_bytes:
            return
        with self._lock:
            before = self._tiles.pop(key, None)
            self.used_bytes += tile.nbytes - (0 if before is None else before.nbytes)
            self._tiles[key] = tile
            while self.used_bytes > self.max_bytes:
                self.used_bytes -= self._tiles.popitem(last=False)[1].nbytes

    def __reduce__(self) -> tuple[type[TileCache], tuple[int]]:
        return TileCache, (self.max_bytes,)  # pickled empty
