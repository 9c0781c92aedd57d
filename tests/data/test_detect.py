"""What rows are is told from their columns, said aloud, and never guessed where it is not clear."""

import pytest
from source_rows import load, turns, write_jsonl

from fasttrain.config.errors import UserError
from fasttrain.config.schema.data import Columns, FileSourceConfig
from fasttrain.data.columns import PAIRS, Sample
from fasttrain.data.detect import detect

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def found(given=None, /, **row):
    columns = Columns(**given) if given else None
    return detect(Sample(tuple(row), [row], "data.sources[0]"), columns)


def refused(given=None, /, **row):
    with pytest.raises(UserError) as caught:
        found(given, **row)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_every_pair_of_the_table(pair):
    prompt, response = pair
    detected = found(**{prompt: "q", response: "a", "id": 7})
    assert detected.kind == "conversation"
    assert detected.columns == {"prompt": prompt, "response": response}
    assert detected.sentence.endswith("by column name; not used: id")


def test_names_in_capitals():
    assert found(Question="q", Answer="a").columns == {"prompt": "Question", "response": "Answer"}


@pytest.mark.parametrize(
    ("row", "columns", "sentence"),
    [
        (
            {"messages": CHAT},
            {"messages": "messages"},
            "conversations (messages), by its lists of messages",
        ),
        (
            {"turns": CHAT, "source": "web"},
            {"messages": "turns"},
            "conversations (turns), by its lists of messages; not used: source",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}], "system": "s"},
            {"messages": "conversations", "system": "system"},
            "ShareGPT conversations (system, conversations), by its lists of messages",
        ),
        (
            {"prompt": "q", "messages": CHAT, "text": "rendered"},
            {"messages": "messages"},
            "conversations (messages), by its lists of messages; not used: prompt, text",
        ),
        (
            {"instruction": "q", "input": "", "output": "a", "text": "rendered"},
            {"prompt": "instruction", "response": "output", "input": "input"},
            "alpaca (instruction, input, output), by column name; not used: text",
        ),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            {"prompt": "instruction", "response": "response", "input": "context"},
            "instruction/response (instruction, context, response), by column name; "
            "not used: category",
        ),
        (
            {
                "system": "s",
                "history": [["a", "b"]],
                "instruction": "q",
                "input": "i",
                "output": "a",
            },
            {
                "prompt": "instruction",
                "response": "output",
                "input": "input",
                "history": "history",
                "system": "system",
            },
            "alpaca (system, history, instruction, input, output), by column name",
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            {"prompt": "prompt", "response": "completion"},
            "prompt/completion (prompt, completion), by column name",
        ),
        (
            {"text": "once", "title": "a tale"},
            {"text": "text"},
            "plain text (text), by column name; not used: title",
        ),
        (
            {"review": "good", "label": 1},
            {"text": "review"},
            "plain text (review), the only column of text; not used: label",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats(row, columns, sentence):
    detected = found(**row)
    assert detected.columns == columns
    assert detected.sentence == sentence
    assert detected.kind == ("text" if "text" in columns else "conversation")


def test_first_rows_may_hold_nulls_and_a_bad_row():
    rows = [{"chat": None}, {"chat": CHAT}, {"chat": CHAT}, {"chat": "oops"}]
    assert detect(Sample(("chat",), rows)).columns == {"messages": "chat"}


# --- columns given --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "row", "columns"),
    [
        ({"messages": "turns"}, {"turns": CHAT, "messages": CHAT}, {"messages": "turns"}),
        (
            {"prompt": "ask", "response": "reply"},
            {"ask": "q", "reply": "a", "text": "t"},
            {"prompt": "ask", "response": "reply"},
        ),
        (
            {"response": "reply"},
            {"question": "q", "reply": "a"},
            {"response": "reply", "prompt": "question"},
        ),
        (
            {"prompt": "ask"},
            {"ask": "q", "answer": "a", "other": "x"},
            {"prompt": "ask", "response": "answer"},
        ),
        (
            {"system": "role"},
            {"question": "q", "answer": "a", "role": "be kind"},
            {"prompt": "question", "response": "answer", "system": "role"},
        ),
        (
            {"input": "passage"},
            {"question": "q", "answer": "a", "passage": "p"},
            {"prompt": "question", "response": "answer", "input": "passage"},
        ),
        ({"text": "body"}, {"body": "b", "text": "t"}, {"text": "body"}),
        (
            {"prompt": "prompt", "response": "chosen"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "prompt", "response": "chosen"},
        ),
        (
            {"messages": "chosen"},
            {"chosen": CHAT, "rejected": CHAT},
            {"messages": "chosen"},
        ),
    ],
)
def test_given_columns_win(given, row, columns):
    detected = found(given, **row)
    assert detected.columns == columns
    assert "as the config says" in detected.sentence


def test_a_given_column_that_is_missing():
    problem = refused({"response": "anser"}, question="q", answer="a")
    assert problem.key == "data.sources[0].columns.response"
    assert problem.what == "there is no column 'anser'. Columns found: question, answer."


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"text": "t", "prompt": "q"}, "text excludes prompt"),
        ({"text": "t", "system": "q"}, "text excludes system"),
        ({"messages": "t", "response": "q"}, "messages excludes response"),
    ],
)
def test_given_columns_that_exclude_each_other(given, what):
    assert what in refused(given, t="x", q="y").what


def test_half_a_pair_that_cannot_be_completed():
    problem = refused({"response": "reply"}, ask="q", reply="a")
    assert problem.key == "data.sources[0].columns.prompt"
    assert "which column is the prompt?" in problem.what and "ask, reply" in problem.what


# --- what is not clear ----------------------------------------------------------------------------


def test_nothing_fits_names_columns_types_and_the_line_to_add():
    problem = refused(quest="q", answr="a", score=1.5)
    assert problem.key == "data.sources[0]"
    assert problem.what == (
        "cannot tell what the rows are; columns found: quest (text), answr (text), score (number)."
    )
    assert problem.hint == (
        "Closest is question/answer; if so, add under this source: "
        "columns: {prompt: quest, response: answr}."
    )


@pytest.mark.parametrize(
    "row", [{"id": 1}, {"x": None}, {"messages": None}, {"labels": [1, 2], "ids": [3]}]
)
def test_no_text_at_all(row):
    assert "cannot tell what the rows are" in refused(**row).what


def test_two_lists_of_messages():
    problem = refused(messages=CHAT, conversations=CHAT)
    assert "more than one format fits" in problem.what
    assert "columns: {messages: messages} or columns: {messages: conversations}" in problem.hint


def test_two_answers():
    problem = refused(question="q", answer="a", response="b")
    assert "columns: {prompt: question, response: answer}" in problem.hint
    assert "columns: {prompt: question, response: response}" in problem.hint


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "{prompt: prompt, response: chosen}"),
        ({"chosen": CHAT, "rejected": CHAT}, "{messages: chosen}"),
        ({"prompt": "q", "chosen": CHAT, "rejected": CHAT}, "{messages: chosen}"),
        (
            {"chosen_messages": CHAT, "rejected_messages": CHAT},
            "{messages: chosen_messages}",
        ),
        ({"chosen": "a", "rejected": "b"}, "{text: chosen}"),
    ],
)
def test_preference_pairs_are_refused_with_what_to_do(row, line):
    problem = refused(**row)
    assert "preference pairs" in problem.what and "chosen" in problem.what
    assert f"columns: {line}" in problem.hint


def test_a_preference_file_with_messages_beside_them_is_taken():
    assert found(chosen=CHAT, rejected=CHAT, messages=CHAT).columns == {"messages": "messages"}


# --- through a file -------------------------------------------------------------------------------


def test_the_line_from_the_hint_makes_the_file_load(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"quest": "q", "answr": "a", "n": 1}] * 3)
    with pytest.raises(UserError, match=r"data.sources\[0\]: cannot tell what the rows are"):
        load(path)
    columns = Columns(prompt="quest", response="answr")
    rows = load(FileSourceConfig(path=str(path), columns=columns))
    assert turns(rows.train[0]) == [("user", "q"), ("assistant", "a")]
    assert rows.reports[0].detected == (
        "quest/answr (quest, answr), as the config says; not used: n"
    )
