"""Steps of any epoch from any position, alike on any split, made ahead in one thread."""

import itertools
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from row_sets import dataset

from fasttrain.core.interfaces import Topology
from fasttrain.data.batches import BatchShape, PackedTraining, made_ahead
from fasttrain.data.documents import Documents
from fasttrain.data.evaluation import PackedEvaluation
from fasttrain.data.pack import Packer


def make_documents(count=60, seed=0):
    """Documents whose every token says which document it is of."""
    lengths = np.random.default_rng(seed).integers(2, 20, count)
    tokens = np.repeat(np.arange(count), lengths).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    supervised = np.ones(len(tokens), np.bool_)
    supervised[offsets[:-1]] = False
    return Documents(
        tokens, supervised, offsets, np.arange(count), np.zeros(count, np.int32), ("s",)
    )


def training(micro=1, accumulation=1, ranks=1, rank=0, capacity=32, window=65536, count=60):
    documents = make_documents(count)
    shape = BatchShape(
        micro,
        accumulation,
        Topology(rank=rank, world_size=ranks, data_parallel_rank=rank, data_parallel_size=ranks),
    )
    packer = Packer(documents.lengths, capacity, window, seed=5)
    return PackedTraining(documents, packer, shape, vocab_size=count)


def steps(data, epoch, step, count):
    with closing(data.stream(epoch, step)) as stream:
        return list(itertools.islice(stream, count))


def ids(step):
    return [batch.input_ids.tolist() for batch in step.micro_batches]


def flat(step):
    return [token for batch in ids(step) for token in batch]


def test_an_epoch_has_every_document_once():
    data = training(micro=2, accumulation=2)
    for epoch in range(2):
        epoch_steps = steps(data, epoch, 0, data.steps_in_epoch(epoch))
        tokens = [token for step in epoch_steps for token in flat(step)]
        assert sorted(tokens) == sorted(data.documents.tokens.tolist())
        assert [step.step_in_epoch for step in epoch_steps] == list(range(len(epoch_steps)))
        assert {step.epoch for step in epoch_steps} == {epoch}
        assert {step.steps_in_epoch for step in epoch_steps} == {len(epoch_steps)}


def test_the_stream_goes_on_with_the_next_epoch_reshuffled():
    data = training(micro=2)
    length = data.steps_in_epoch(0)
    first, second = steps(data, 0, length - 1, 2)
    assert (first.epoch, first.step_in_epoch) == (0, length - 1)
    assert (second.epoch, second.step_in_epoch) == (1, 0)
    assert ids(steps(data, 0, 0, 1)[0]) != ids(second)


@pytest.mark.parametrize("window", [65536, 16])
def test_any_position_is_reached_on_its_own(window):
    straight = steps(training(micro=2, window=window), 0, 0, 40)
    for place in (0, 3, 13, 25, 39):
        there = straight[place]
        fresh = training(micro=2, window=window)
        [again] = steps(fresh, there.epoch, there.step_in_epoch, 1)
        assert ids(again) == ids(there)
        assert again.steps_in_epoch == there.steps_in_epoch


def test_the_end_of_an_epoch_is_the_begin_of_the_next():
    data = training()
    [step] = steps(data, 0, data.steps_in_epoch(0), 1)
    assert (step.epoch, step.step_in_epoch) == (1, 0)


def test_a_global_batch_is_the_same_however_it_is_split():
    whole = [flat(step) for step in steps(training(micro=8), 0, 0, 4)]
    for micro, accumulation in ((1, 8), (2, 4), (4, 2)):
        data = training(micro=micro, accumulation=accumulation)
        split = steps(data, 0, 0, 4)
        assert [flat(step) for step in split] == whole
        assert all(len(step.micro_batches) <= accumulation for step in split)


def test_ranks_share_the_same_global_batches():
    whole = steps(training(micro=8), 0, 0, 4)
    shares = [steps(training(micro=2, accumulation=2, ranks=2, rank=r), 0, 0, 4) for r in (0, 1)]
    for number, step in enumerate(whole):
        both = sorted(flat(shares[0][number]) + flat(shares[1][number]))
        assert both == sorted(flat(step))
        work = [
            sum(n**2 for batch in share[number].micro_batches for n in batch.layout.lengths)
            for share in shares
        ]
        assert max(work) < 1.5 * min(work)
    assert training(micro=2, accumulation=2, ranks=2).steps_in_epoch(0) == training(
        micro=8
    ).steps_in_epoch(0)


def test_fewer_packs_than_a_global_batch_are_one_short_step():
    data = training(micro=4, accumulation=100)
    assert data.steps_in_epoch(0) == 1
    [step] = steps(data, 0, 0, 1)
    assert sorted(flat(step)) == sorted(data.documents.tokens.tolist())


def test_more_ranks_than_packs_leave_some_without():
    shares = [
        steps(training(ranks=4, rank=rank, count=2, capacity=32), 0, 0, 1)[0] for rank in range(4)
    ]
    sizes = sorted(len(share.micro_batches) for share in shares)
    assert sum(sizes) >= 1 and sizes[0] == 0
    assert sum(len(flat(share)) for share in shares) == make_documents(2).num_tokens


def test_unpacked_a_row_is_a_document():
    data = training(micro=3, capacity=None)
    for step in steps(data, 0, 0, data.steps_in_epoch(0)):
        assert [len(batch.layout.lengths) for batch in step.micro_batches] == [3]


def test_token_counts_are_those_of_an_epoch():
    data = training(micro=2)
    counted = torch.zeros(60, dtype=torch.int64)
    for step in steps(data, 0, 0, data.steps_in_epoch(0)):
        for batch in step.micro_batches:
            counted += torch.bincount(batch.labels[batch.supervised_index], minlength=60)
    assert data.token_counts(60).tolist() == counted.tolist()


def background_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fasttrain-batches")]


def test_closing_a_stream_ends_its_thread():
    stream = training().stream(0, 0)
    next(stream)
    assert background_threads()
    stream.close()
    assert not background_threads()


def test_the_next_one_is_made_meanwhile_and_an_error_comes_in_its_turn():
    made = []
    second = threading.Event()

    def make():
        made.append(len(made))
        if len(made) == 2:
            second.set()
        if len(made) == 3:
            raise OSError("disk gone")
        return made[-1]

    stream = made_ahead(make)
    assert next(stream) == 0
    assert second.wait(timeout=30)
    assert next(stream) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    assert not background_threads()


# --- held-out documents


def evaluation(micro=2, ranks=1, rank=0, rows=None):
    documents = make_documents()
    shape = BatchShape(micro, 1, Topology(rank, ranks, rank, ranks))
    packer = Packer(documents.lengths, 32, 65536, seed=0)
    return PackedEvaluation(rows, documents, packer, shape, None, vocab_size=60)


def test_held_out_batches_are_always_the_same_and_complete():
    first = [batch.input_ids.tolist() for batch in evaluation().batches()]
    assert [batch.input_ids.tolist() for batch in evaluation().batches()] == first
    tokens = sorted(token for batch in first for token in batch)
    assert tokens == sorted(make_documents().tokens.tolist())


def test_ranks_divide_the_held_out_documents():
    whole = sorted(token for batch in evaluation().batches() for token in batch.input_ids.tolist())
    shares = [
        token
        for rank in range(3)
        for batch in evaluation(ranks=3, rank=rank).batches()
        for token in batch.input_ids.tolist()
    ]
    assert sorted(shares) == whole


def test_prompts_are_spread_over_the_rows_and_cut_at_a_blank():
    filler = ["one two three"] * 29
    texts = ["the quick brown fox jumps", *filler, "unbreakable", *filler]
    prompts = evaluation(rows=dataset(texts=texts)).prompts(2)
    assert prompts == [("the quick brown", " fox jumps"), ("unbre", "akable")]
    assert len(evaluation(rows=dataset(texts=texts)).prompts(100)) == 60
