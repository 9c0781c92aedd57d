"""A flat batch: labels are shifted already, and nothing crosses a document's end."""

import numpy as np
import pytest
import torch

from fasttrain.core.batch import IGNORED_LABEL
from fasttrain.data.collate import collate
from fasttrain.data.documents import Documents


def documents(*parts, source_ids=None):
    """Documents of (ids, supervised flags)."""
    lengths = [len(ids) for ids, _ in parts]
    return Documents(
        tokens=np.array([i for ids, _ in parts for i in ids], np.int32),
        supervised=np.array([flag for _, flags in parts for flag in flags], np.bool_),
        offsets=np.cumsum([0, *lengths]),
        rows=np.arange(len(parts)),
        source_ids=np.array(source_ids or [0] * len(parts), np.int32),
        source_names=("a", "b"),
    )


THREE = documents(
    ([5, 6, 7], [False, True, True]),
    ([8, 9], [False, False]),
    ([1, 2, 3, 4], [False, False, True, False]),
    source_ids=[0, 1, 0],
)


def test_labels_are_the_next_supervised_tokens():
    batch = collate(THREE, np.array([0, 1, 2]), vocab_size=10)
    no = IGNORED_LABEL
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert batch.labels.tolist() == [6, 7, no, no, no, no, 3, no, no]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert batch.supervised_index.tolist() == [0, 1, 6]
    assert batch.num_supervised == 3 and batch.num_tokens == 9
    assert batch.layout.lengths == (3, 2, 4)
    assert batch.sources == ("a", "b", "a")


def test_types_are_those_of_the_contract():
    batch = collate(THREE, np.array([2, 0]), vocab_size=10)
    int64 = (batch.input_ids, batch.labels, batch.position_ids, batch.supervised_index)
    assert all(tensor.dtype == torch.int64 for tensor in int64)
    assert batch.cu_seqlens.dtype == torch.int32
    assert all(type(length) is int for length in batch.layout.lengths)
    assert type(batch.num_supervised) is int


def test_a_batch_without_supervised_tokens_is_legal():
    batch = collate(THREE, np.array([1]), vocab_size=10)
    assert batch.num_supervised == 0 and batch.supervised_index.shape == (0,)


def test_the_end_of_a_document_never_predicts_the_next_one():
    """Even where the next document's first token is flagged, which Documents rules out."""
    batch = collate(THREE, np.array([0, 2]), vocab_size=10)
    ends = batch.cu_seqlens[1:].long() - 1
    assert (batch.labels[ends] == IGNORED_LABEL).all()


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_an_id_out_of_range_is_named_with_its_source(bad):
    wrong = documents(([5, 6], [False, True]), ([1, bad], [False, True]), source_ids=[0, 1])
    with pytest.raises(ValueError, match=f"a document of b has the token id {bad}"):
        collate(wrong, np.array([0, 1]), vocab_size=10)


def test_targets_are_counted():
    assert THREE.num_supervised == 3
    assert THREE.target_counts(10).tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 0, 0]
