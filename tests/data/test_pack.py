"""Packs are full, whole, seeded, and the same on any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data.pack import Packer, balanced_shares, best_fit_decreasing


def some_lengths(count, seed=0, limit=512):
    lengths = np.random.default_rng(seed).lognormal(4, 1, count).astype(np.int64) + 2
    return np.minimum(lengths, limit)


def as_lists(packs):
    return [packs[index].tolist() for index in range(len(packs))]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    window=st.integers(1, 70),
    epoch=st.integers(0, 3),
)
def test_every_document_once_and_no_pack_too_long(lengths, window, epoch):
    lengths = np.array(lengths)
    packs = Packer(lengths, 50, window, seed=1).packs(epoch)
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    for pack in as_lists(packs):
        assert 0 < lengths[pack].sum() <= 50


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_best_fit_decreasing_is_that_of_the_book(lengths):
    """Against the definition: each document, longest first, into the fullest pack that takes it."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(20 - length)
    lengths = np.array(lengths)
    packs = best_fit_decreasing(lengths, np.arange(len(lengths)), 20)
    assert sorted(20 - lengths[pack].sum() for pack in as_lists(packs)) == sorted(rooms)


def test_packs_are_nearly_full():
    lengths = some_lengths(5000)
    fewest = -(-lengths.sum() // 2048)
    assert len(Packer(lengths, 2048, 65536, seed=0).packs(0)) == fewest
    # Each of the 20 windows may leave one pack that is not full.
    assert len(Packer(lengths, 2048, 256, seed=0).packs(0)) <= fewest + 20


def test_waste_is_the_empty_share():
    lengths = np.array([6, 6, 3])
    packs = Packer(lengths, 10, 100, seed=0).packs(0)
    assert len(packs) == 2
    assert packs.waste(lengths, 10) == pytest.approx(5 / 20)


def test_epochs_differ_and_each_can_be_made_again_on_its_own():
    packer = Packer(some_lengths(300), 1024, 100, seed=3)
    first, second = as_lists(packer.packs(0)), as_lists(packer.packs(1))
    assert first != second
    assert as_lists(Packer(some_lengths(300), 1024, 100, seed=3).packs(1)) == second
    assert as_lists(Packer(some_lengths(300), 1024, 100, seed=4).packs(1)) != second


def test_packs_are_shuffled():
    """Best fit begins with the longest documents; training does not."""
    lengths = some_lengths(400)
    longest = [max(lengths[pack]) for pack in as_lists(Packer(lengths, 1024, 400, 3).packs(0))]
    assert longest != sorted(longest, reverse=True)


def test_unpacked_each_document_is_a_pack():
    packs = Packer(some_lengths(50), None, 10, seed=3).packs(0)
    assert [len(pack) for pack in as_lists(packs)] == [1] * 50
    assert packs.documents.tolist() != list(range(50))


def test_within_one_window_epochs_have_the_same_number_of_packs():
    lengths = some_lengths(400)
    packer = Packer(lengths, 700, 400, seed=0)
    assert not packer.count_varies
    assert len({len(packer.packs(epoch)) for epoch in range(6)}) == 1
    assert Packer(lengths, 700, 100, seed=0).count_varies


def test_attention_costs_are_sums_of_squares():
    lengths = np.array([6, 6, 3, 1])
    packs = best_fit_decreasing(lengths, np.arange(4), 10)
    assert as_lists(packs) == [[0], [1, 2, 3]]
    assert packs.attention_costs(lengths, 0, 2).tolist() == [36.0, 46.0]
    assert packs.attention_costs(lengths, 1, 2).tolist() == [46.0]


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.floats(1, 1e9), min_size=1, max_size=40),
    ranks=st.integers(1, 8),
)
def test_shares_are_equal_in_number_and_complete(costs, ranks):
    shares = balanced_shares(np.array(costs), ranks)
    assert sorted(pack for share in shares for pack in share) == list(range(len(costs)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(share == sorted(share) for share in shares)


def test_shares_are_balanced_by_cost():
    costs = np.array([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0])
    shares = balanced_shares(costs, 2)
    assert [sum(costs[share]) for share in shares] == [20.0, 20.0]
    assert balanced_shares(costs, 1) == [list(range(8))]
