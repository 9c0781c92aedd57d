"""The tile table: what the programs of a GPU kernel do, decided on the host once per batch.

A tile is up to TILE tokens that lie next to each other, either of one document, or of several whole
short ones. It names its tokens and the span of the documents that they belong to, so that a kernel
finds from one row where its keys (or, seen from the keys, its queries) begin and end.
"""

from itertools import pairwise

import torch
from torch import Tensor

TILE = 128  # tokens
BEGIN, END, SPAN_BEGIN, SPAN_END = range(4)  # columns of the table


def tile_table(offsets: Tensor) -> Tensor:
    """offsets (docs + 1,) on the CPU -> (tiles, 4) int32 on the CPU, the costliest tiles first.

    Columns: the first token and the one after the last; the first token of the first token's
    document, and the one after the last token's document. Every token is in one tile.
    """
    tiles: list[tuple[int, int, int, int]] = []
    begin = end = 0  # of the tile that short documents are being collected in
    bounds = offsets.tolist()
    for start, stop in pairwise(bounds):
        if stop - begin > TILE and end > begin:
            tiles.append((begin, end, begin, end))
            begin = start
        if stop - start > TILE:
            cuts = [*range(start, stop, TILE), stop]
            tiles += [(a, b, start, stop) for a, b in pairwise(cuts)]
            begin = stop
        end = stop
    if end > begin:
        tiles.append((begin, end, begin, end))
    tiles.sort(key=lambda tile: (tile[SPAN_BEGIN] - tile[SPAN_END], tile[SPAN_BEGIN] - tile[END]))
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4)
