"""The tile table: what the programs of a GPU kernel do, decided on the host once per batch.

A tile is TILE rows of tokens: either those of one document that follow one another, cut from the
document's beginning, or several whole short documents (of at most SHARED_LENGTH tokens). A program
of a pass over queries takes one tile (or a part of it) and one head, finds in the tile's row of the
table where its keys begin and end, and walks over them; a pass over keys, over their queries.

Costly tiles come first: programs start in the order of their numbers, so that what is left when a
GPU runs out of tiles is short. In a causal pass over queries the cost of a tile is where it ends in
its document; in one over keys, how far it is from there to the end: column BY_KEYS is that order.

Short documents lie in slots of SLOT rows, each in 1, 2 or 4 of them, from a multiple of that
number. So wherever a document lies, sums over its rows, in whichever order a tree of halves or a
matrix unit takes them, are those of the document alone, and zeros.
"""

import torch
from torch import Tensor

TILE = 128  # rows
SLOT = 16  # rows: the depth of a matrix unit's step, and the smallest block
SLOTS = TILE // SLOT
SHARED_LENGTH = TILE // 2  # tokens; a longer document has tiles of its own

# Columns: of a document's own tile, where it begins in the document, the document's length and its
# first token; of a shared tile 0, TILE and 0. Then whether it is shared, and the number of the tile
# that comes at this place in a pass over keys.
FIRST, LENGTH, BEGIN, SHARED, BY_KEYS = range(5)
# And of each slot, SLOTS columns from: its first token, and the document's first and end. A row
# holds a token where that is less than the end.
SLOT_TOKEN, SLOT_BEGIN, SLOT_END = range(8, 8 + 3 * SLOTS, SLOTS)
COLUMNS = 8 + 3 * SLOTS  # 128 bytes: a line of the cache


def tile_table(offsets: Tensor) -> Tensor:
    """offsets (docs + 1,) on the CPU -> (tiles, COLUMNS) int32 on the CPU, the costliest first."""
    begins, ends = offsets[:-1].long(), offsets[1:].long()
    lengths = ends - begins
    own, short = lengths > SHARED_LENGTH, (lengths > 0) & (lengths <= SHARED_LENGTH)
    tiles = torch.cat([_own(begins[own], ends[own]), _shared(begins[short], ends[short])])
    first, length = tiles[:, FIRST], tiles[:, LENGTH]
    tiles = tiles[(first + TILE).minimum(length).argsort(stable=True, descending=True)]
    to_the_end = tiles[:, LENGTH] - tiles[:, FIRST]
    tiles[:, BY_KEYS] = to_the_end.argsort(stable=True, descending=True)
    return tiles.int()


def _own(begins: Tensor, ends: Tensor) -> Tensor:
    """Tiles of one document each."""
    counts = (ends - begins + TILE - 1) // TILE
    document = torch.arange(len(counts)).repeat_interleave(counts)
    begin, end = begins[document, None], ends[document, None]
    first = _places(counts)[:, None] * TILE
    token = begin + first + SLOT * torch.arange(SLOTS)
    of_slots = [token, begin.expand_as(token), end.expand_as(token)]
    head = torch.zeros(len(document), 8, dtype=torch.long)
    head[:, FIRST], head[:, LENGTH], head[:, BEGIN] = first[:, 0], (end - begin)[:, 0], begin[:, 0]
    return torch.cat([head, *of_slots], 1)


def _shared(begins: Tensor, ends: Tensor) -> Tensor:
    """Tiles of short documents. The larger are placed first, so each begins at a multiple of its
    number of slots, and none lies in two tiles."""
    lengths = ends - begins
    sizes = 1 + (lengths > SLOT).long() + 2 * (lengths > 2 * SLOT)
    order = sizes.argsort(stable=True, descending=True)
    sizes = sizes[order]
    document = order.repeat_interleave(sizes)
    begin, end = begins[document], ends[document]
    token = begin + SLOT * _places(sizes)
    tiles = -(-len(document) // SLOTS)
    slots = torch.zeros(3, tiles * SLOTS, dtype=torch.long)
    slots[:, : len(document)] = torch.stack([token, begin, end])
    head = torch.zeros(tiles, 8, dtype=torch.long)
    head[:, LENGTH], head[:, SHARED] = TILE, 1
    return torch.cat(
        [head, slots.view(3, tiles, SLOTS).transpose(0, 1).reshape(tiles, 3 * SLOTS)], 1
    )


def _places(counts: Tensor) -> Tensor:
    """0 to n - 1 for each n of `counts`, one after the other."""
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) - before.repeat_interleave(counts)
