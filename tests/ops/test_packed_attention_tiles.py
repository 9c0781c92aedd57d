"""The tile table: every token in one row, documents where sums over them are the same, order."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from fasttrain_kernels.layout import DocumentLayout
from fasttrain_kernels.ops.packed_attention.tiles import (
    BEGIN,
    BY_KEYS,
    COLUMNS,
    FIRST,
    LENGTH,
    SHARED,
    SHARED_LENGTH,
    SLOT,
    SLOT_BEGIN,
    SLOT_END,
    SLOT_TOKEN,
    SLOTS,
    TILE,
    tile_table,
)
from hypothesis import example, given, settings
from ops.attention_calls import Attention, assert_exact, kernel_of
from ops.conftest import INTERPRETED, Place

LENGTHS = st.lists(st.one_of(st.integers(0, 3 * SLOT), st.integers(0, 3 * TILE)), max_size=20)


def table_of(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    table = tile_table(offsets)
    assert table.dtype == torch.int32 and table.shape[1] == COLUMNS and table.is_contiguous()
    return offsets.tolist(), table


def rows_of(tile):
    """token, document's begin and end of each row that has a token; None for the others."""
    for row in range(TILE):
        slot = row // SLOT
        token = tile[SLOT_TOKEN + slot] + row % SLOT
        begin, end = tile[SLOT_BEGIN + slot], tile[SLOT_END + slot]
        yield (token, begin, end) if token < end else None


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
@example([])
@example([0, 0])
@example([1, 0, TILE, TILE + 1, SHARED_LENGTH, SHARED_LENGTH + 1, SLOT, SLOT + 1])
def test_every_token_has_one_row_that_knows_its_document(lengths):
    bounds, table = table_of(lengths)
    found = sorted(row for tile in table.tolist() for row in rows_of(tile) if row is not None)
    documents = [(a, b) for a, b in pairwise(bounds) if a < b]
    assert found == [(token, a, b) for a, b in documents for token in range(a, b)]


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_short_documents_lie_where_halving_a_tile_leaves_them_whole(lengths):
    _, table = table_of(lengths)
    for tile in table[table[:, SHARED] == 1].tolist():
        assert [tile[FIRST], tile[LENGTH], tile[BEGIN]] == [0, TILE, 0]
        places = {}
        for row, entry in enumerate(rows_of(tile)):
            if entry is not None:
                places.setdefault(entry[1:], []).append((row, entry[0]))
        for (begin, end), rows in places.items():
            assert end - begin <= SHARED_LENGTH
            first = rows[0][0]
            assert rows == [(first + i, begin + i) for i in range(end - begin)]
            size = SLOT
            while size < end - begin:
                size *= 2
            assert first % size == 0


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_longer_documents_are_cut_from_their_beginning(lengths):
    _, table = table_of(lengths)
    own = table[table[:, SHARED] == 0]
    assert (own[:, FIRST] % TILE == 0).all() and (own[:, LENGTH] > SHARED_LENGTH).all()
    for tile in own.tolist():
        tokens = [row[0] for row in rows_of(tile) if row is not None]
        begin, first, length = tile[BEGIN], tile[FIRST], tile[LENGTH]
        assert tokens == list(range(begin + first, begin + min(first + TILE, length)))
        assert tile[SLOT_BEGIN : SLOT_BEGIN + SLOTS] == [begin] * SLOTS
        assert tile[SLOT_END : SLOT_END + SLOTS] == [begin + length] * SLOTS


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_the_costliest_come_first(lengths):
    _, table = table_of(lengths)
    keys = (table[:, FIRST] + TILE).minimum(table[:, LENGTH])  # that its last query sees
    assert (keys.diff() <= 0).all()
    by_keys = table[:, BY_KEYS].long()
    assert sorted(by_keys.tolist()) == list(range(len(table)))
    queries = (table[:, LENGTH] - table[:, FIRST])[by_keys]  # that see its first key
    assert (queries.diff() <= 0).all()


@pytest.mark.parametrize("length", [1, SLOT, SLOT + 1, 2 * SLOT, 33, SHARED_LENGTH])
def test_documents_of_one_length_fill_their_tiles(length):
    """As far as powers of two allow: no tile is begun before the last is full."""
    size = next(size for size in (1, 2, 4) if size * SLOT >= length)
    _, table = table_of([length] * 100)
    assert len(table) == -(-100 * size // SLOTS)


def test_a_layout_holds_the_table():
    layout = DocumentLayout((5, 0, 200))
    assert torch.equal(layout.tiles, table_of([5, 0, 200])[1])


@pytest.mark.skipif(not INTERPRETED, reason="the blocks of a GPU are for its architecture")
@pytest.mark.parametrize(
    "call",
    [
        Attention((150, 5, 40)),
        Attention((150, 40), window=40),
        Attention((150, 40), False, 70),
        Attention((40,), window=39),  # which the last query doesn't see all of
    ],
    ids=lambda call: f"triton-interpreted-{call.causal}-{call.window}",
)
def test_a_tile_may_be_cut_into_smaller_blocks(call, monkeypatch):
    """As on GPUs; in the interpreter they are large otherwise, for few programs."""
    kernel = kernel_of("triton")
    narrow, wide = kernel.Blocks(32, 16, 1, 1), kernel.Blocks(32, 64, 1, 1)
    for first, second in ((narrow, wide), (wide, narrow)):
        small = kernel.Configuration(first, second, first)
        monkeypatch.setattr(kernel, "INTERPRETED", small)
        assert_exact(Place("triton", "cpu"), (1, 1, 16), call)
