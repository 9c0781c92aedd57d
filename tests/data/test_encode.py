"""Rows become documents; none is lost without being counted."""

from dataclasses import replace

import chats
import numpy as np
import pytest
from row_sets import chat, dataset

from fasttrain.data.encode import EncodeOptions, Encoder
from fasttrain.data.template import ChatTemplate
from fasttrain.data.workers import encode_rows

OPTIONS = EncodeOptions(max_length=64, overlong="truncate", invalid="error", supervise_all=False)
TOKENIZER = chats.tokenizer(chats.CHATML)


def encoder(family=chats.CHATML, **options):
    tokenizer = chats.tokenizer(family)
    return Encoder(tokenizer, ChatTemplate(tokenizer), replace(OPTIONS, **options))


def encode(rows, **options):
    return encoder(**options).encode(rows[:], 0)


def test_plain_text_is_learnt_whole_and_ended():
    chunk = encode(dataset(texts=["The answer is four."]))
    [tokens], [supervised] = chunk.tokens, chunk.supervised
    assert TOKENIZER.decode(tokens) == "The answer is four.<|im_end|>"
    assert supervised.tolist() == [False] + [True] * (len(tokens) - 1)
    assert tokens.dtype == np.int32 and supervised.dtype == np.bool_


def test_plain_text_that_ends_itself_is_not_ended_twice():
    chunk = encode(dataset(texts=["The answer is four.<|im_end|>"]))
    assert TOKENIZER.decode(chunk.tokens[0]).count("<|im_end|>") == 1


def test_text_and_conversations_keep_the_order_of_the_rows():
    rows = dataset(chats=[chat("?", "yes"), chat("?", "no")], texts=["Paris"])
    chunk = encode(rows)
    assert chunk.rows == [0, 1, 2]
    ends = [TOKENIZER.decode(tokens)[-16:] for tokens in chunk.tokens]
    assert ["yes" in ends[0], "no" in ends[1], "Paris" in ends[2]] == [True] * 3


def test_a_long_document_keeps_its_head():
    rows = dataset(texts=["Paris " * 200, "Paris"])
    chunk = encode(rows)
    assert len(chunk.tokens[0]) == 64
    whole = encode(rows, max_length=4096)
    assert chunk.tokens[0].tolist() == whole.tokens[0][:64].tolist()
    assert chunk.tally.truncated == {"train.jsonl": 1}


def test_a_long_text_can_become_several_documents():
    rows = dataset(texts=["Paris " * 200, "Paris"])
    chunk = encode(rows, overlong="split")
    whole = encode(rows, max_length=4096)
    pieces = [tokens for row, tokens in zip(chunk.rows, chunk.tokens, strict=True) if row == 0]
    assert np.concatenate(pieces).tolist() == whole.tokens[0].tolist()
    assert {len(tokens) for tokens in pieces[:-1]} == {64}
    for supervised in chunk.supervised:  # a piece's first token has nothing before it
        assert not supervised[0] and supervised[1:].all()
    assert (chunk.tally.split, chunk.tally.truncated) == ({"train.jsonl": 1}, {})


def test_a_split_never_ends_in_a_document_of_one_token():
    whole = encode(dataset(texts=["Paris " * 200]), max_length=4096).tokens[0]
    chunk = encode(dataset(texts=["Paris " * 200]), overlong="split", max_length=len(whole) - 1)
    assert [len(tokens) for tokens in chunk.tokens] == [len(whole) - 1]


def test_a_document_whose_answer_is_cut_off_is_dropped_and_counted():
    rows = dataset(chats=[chat("long " * 100, "yes"), chat("?", "no")])
    chunk = encode(rows)
    assert chunk.rows == [1]
    assert chunk.tally.reasons("train.jsonl") == {
        "nothing left to learn within max_length (first: train.jsonl:1)": 1
    }
    assert not chunk.tally.truncated


def test_overlong_rows_can_be_dropped_or_refused():
    rows = dataset(texts=["Paris " * 200, "Paris"])
    dropped = encode(rows, overlong="drop")
    assert dropped.rows == [1]
    assert list(dropped.tally.reasons("train.jsonl")) == [
        "longer than max_length (first: train.jsonl:1)"
    ]
    [problem] = encode(rows, overlong="error").problems
    assert "train.jsonl:1" in str(problem) and "data.max_length (64)" in str(problem)


def test_a_conversation_with_nothing_to_learn_is_dropped_and_counted():
    chunk = encode(dataset(chats=[chat("?", "yes", train=False)]))
    assert not chunk.tokens
    assert chunk.tally.dropped.total() == 1


@pytest.mark.parametrize("family", [chats.ALPACA, chats.GLM])
def test_an_end_that_the_template_forgets_is_added_and_learnt(family):
    chunk = encoder(family).encode(dataset(chats=[chat("?", "yes")])[:], 0)
    tokenizer = chats.tokenizer(family)
    assert chunk.tokens[0][-1] == tokenizer.eos_token_id
    assert chunk.supervised[0][-1]
    # What stands between the answer and the end is learnt too: the model has to write it.
    first = chunk.supervised[0].tolist().index(True)
    assert all(chunk.supervised[0][first:])


def test_any_number_of_workers_gives_the_same_chunks():
    rows = dataset(
        chats=[chat("Answer?", f"yes {number}") for number in range(1500)],
        texts=[f"Paris {number}" for number in range(700)],
    )

    def everything(workers):
        found = list(encode_rows(rows, encoder(), workers=workers))
        tokens = [array.tolist() for chunk in found for array in chunk.tokens]
        return tokens, [row for chunk in found for row in chunk.rows]

    assert everything(2) == everything(1)


def test_workers_stop_when_nobody_listens_any_more():
    rows = dataset(texts=[f"Paris {number}" for number in range(2100)])
    chunks = encode_rows(rows, encoder(), workers=2)
    assert len(next(chunks).tokens) == 512
    chunks.close()
