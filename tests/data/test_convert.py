"""Rows become conversations exactly, or are refused with row and field."""

import json

import pytest
from source_rows import chats, load, turns, write_jsonl

from fasttrain.config.errors import UserError
from fasttrain.core.interfaces import Examples
from fasttrain.data.conversation import Conversation, Message
from fasttrain.data.convert import convert_conversation, convert_text
from fasttrain.data.messages import ROLE_NAMES, RowError

MESSAGES = {"messages": "messages"}
PAIR = {"prompt": "q", "response": "a"}


def user(content="hi", **more):
    return {"role": "user", "content": content, **more}


def assistant(content="hello", **more):
    return {"role": "assistant", "content": content, **more}


def convert(messages, supervise="answers", **row):
    return convert_conversation({"messages": messages, **row}, MESSAGES, supervise).messages


# --- what is taken --------------------------------------------------------------------------------


def test_seven_turns_keep_their_order():
    """One system turn and three exchanges stay seven messages."""
    said = [("system", "be brief")]
    said += [(role, f"{role} {n}") for n in range(3) for role in ("user", "assistant")]
    got = convert([{"role": role, "content": content} for role, content in said])
    assert [(message.role, message.content) for message in got] == said


@pytest.mark.parametrize("name", ROLE_NAMES)
def test_role_names_of_other_formats(name):
    value = '{"name": "f", "arguments": {}}' if name == "function_call" else "text"
    got = convert([{"from": name, "value": value}, assistant()])
    assert got[0].role == ROLE_NAMES[name]
    assert convert([{"role": name.upper(), "content": value}, assistant()])[0].role == got[0].role


def test_user_turns_in_a_row_and_an_assistant_that_begins():
    assert len(convert([user(), user("again"), assistant()])) == 3
    assert [message.role for message in convert([assistant(), user()])] == ["assistant", "user"]


@pytest.mark.parametrize("text", [" padded \n", "多言語 🎉", "<|im_end|>", "a\x00b", "a\u2028b"])
def test_text_is_kept_to_the_character(text):
    (question, answer) = convert([user(text), assistant(text)])
    assert (question.content, answer.content) == (text, text)
    chat = Conversation((question, answer))
    assert Conversation.from_json(chat.to_json()) == chat


def test_everything_a_message_can_hold_survives_json():
    chat = Conversation(
        (
            Message("system", "s", name="boss"),
            Message("user", "q", train=False),
            Message(
                "assistant",
                None,
                tool_calls=(
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}},
                ),
                reasoning="let me see",
                train=True,
            ),
            Message("tool", "{}", tool_call_id="1"),
        )
    )
    assert Conversation.from_json(chat.to_json()) == chat
    assert json.loads(chat.to_json())[1] == {"role": "user", "content": "q", "train": False}


@pytest.mark.parametrize(
    ("field", "value", "train"),
    [
        ("train", True, True),
        ("train", False, False),
        ("weight", 0, False),
        ("weight", 1, True),
        ("loss_weight", 1.0, True),
        ("train", None, None),
    ],
)
def test_flags_per_message(field, value, train):
    assert convert([user(), assistant(), assistant(**{field: value})])[2].train is train


def test_an_answer_that_is_not_trained_may_be_empty():
    assert len(convert([user(), assistant("", weight=0), user(), assistant()])) == 4


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning(key):
    assert convert([user(), assistant(**{key: "hm"})])[1].reasoning == "hm"


def test_content_parts_of_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "value": "two"}, " three"]
    assert convert([user(parts), assistant()])[0].content == "one two three"


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "add", "arguments": {"a": 1}}, "type": "function"},
        {"function": {"name": "add", "arguments": '{"a": 1}'}},
        {"name": "add", "arguments": {"a": 1}},
    ],
)
def test_tool_calls_take_one_form(call):
    (got,) = convert([user(), {"role": "assistant", "tool_calls": [call]}])[1].tool_calls
    assert got == {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_messages_as_json_text():
    text = json.dumps([user(), assistant()])
    assert [message.role for message in convert(text)] == ["user", "assistant"]


def test_system_columns():
    row = {"messages": [user(), assistant()], "system": "be kind"}
    columns = {**MESSAGES, "system": "system"}
    assert convert_conversation(row, columns, "answers").messages[0] == Message("system", "be kind")
    row["messages"].insert(0, {"role": "system", "content": "own"})
    first, *_ = convert_conversation(row, columns, "answers").messages
    assert first.content == "own"
    for empty in ("", None):
        row = {"messages": [user(), assistant()], "system": empty}
        assert len(convert_conversation(row, columns, "answers").messages) == 2


def test_pairs_with_input_history_and_system():
    row = {"s": "sys", "h": [["q1", "a1"], ["q2", "a2"]], "q": "q3", "i": "more", "a": "a3"}
    columns = {**PAIR, "system": "s", "history": "h", "input": "i"}
    got = convert_conversation(row, columns, "answers").messages
    assert [message.content for message in got] == [
        "sys",
        "q1",
        "a1",
        "q2",
        "a2",
        "q3\n\nmore",
        "a3",
    ]
    row |= {"h": None, "i": "", "s": ""}
    got = convert_conversation(row, columns, "answers").messages
    assert [message.content for message in got] == ["q3", "a3"]


def test_pairs_of_message_lists():
    row = {"q": [{"role": "system", "content": "s"}, user()], "a": [assistant()]}
    got = convert_conversation(row, PAIR, "answers").messages
    assert [message.role for message in got] == ["system", "user", "assistant"]


def test_where_every_token_is_learnt_no_answer_is_needed():
    assert len(convert([user()], supervise="all")) == 1
    with pytest.raises(RowError, match="no assistant turn"):
        convert([user()])


# --- what is refused ------------------------------------------------------------------------------

CALL = {"role": "assistant", "tool_calls": [{"arguments": {}}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
REFUSED = {
    "no list": ({}, "messages", "wrong type (an object; expected a list of messages)"),
    "number": (3, "messages", "wrong type (the number 3;"),
    "null": (None, "messages", "null messages"),
    "empty": ([], "messages", "empty conversation"),
    "text": ("[{'role': 'user'}]", "messages", "invalid JSON (a Python list was printed here;"),
    "message": ([user(), "hello"], "messages[1]", "wrong type (text; expected an object"),
    "role": (
        [user(), {"role": "robot", "content": "x"}],
        "messages[1].role",
        "unknown role ('robot'; known: system, developer, user,",
    ),
    "role type": ([{"role": 1, "content": "x"}], "messages[0].role", "unknown role (the number 1;"),
    "no role": ([{"content": "x"}], "messages[0]", "message without role (fields: content)"),
    "no content": ([user(), {"role": "assistant"}], "messages[1]", "message without content"),
    "null content": (
        [user(None), assistant()],
        "messages[0]",
        "message without content (role user",
    ),
    "content type": ([user(7), assistant()], "messages[0].content", "wrong type (the number 7;"),
    "content object": ([user({}), assistant()], "messages[0].content", "wrong type (an object;"),
    "image": (
        [user(IMAGE), assistant()],
        "messages[0].content[0]",
        "content is not text (a part of",
    ),
    "part": ([user([5]), assistant()], "messages[0].content[0]", "wrong type (the number 5;"),
    "no assistant": ([user()], "messages", "no assistant turn"),
    "no trained": ([user(), assistant(weight=0)], "messages", "every turn is excluded"),
    "empty answer": ([user(), assistant(" \n")], "messages[1]", "empty answer"),
    "one empty answer": (
        [user(), assistant(), user(), assistant("")],
        "messages[3]",
        "empty answer",
    ),
    "weight": (
        [user(), assistant(weight=0.5)],
        "messages[1].weight",
        "unsupported weight (the number",
    ),
    "flag": ([user(), assistant(train="yes")], "messages[1].train", "unsupported weight ('yes';"),
    "call": ([user(), CALL], "messages[1].tool_calls[0]", "tool call without a name"),
    "calls": (
        [user(), {"role": "assistant", "tool_calls": "f()"}],
        "messages[1].tool_calls",
        "invalid JSON",
    ),
    "arguments": (
        [user(), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}],
        "messages[1].tool_calls[0].arguments",
        "wrong type (a list; expected an object)",
    ),
    "name": ([user(name=3), assistant()], "messages[0].name", "wrong type (the number 3;"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_malformed_is_refused_with_its_field(case):
    messages, field, what = REFUSED[case]
    with pytest.raises(RowError) as caught:
        convert(messages)
    assert caught.value.field == field
    assert f"{caught.value.reason} {caught.value.detail}".startswith(what)


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"q": None, "a": "x"}, "q", "null text"),
        ({"q": " ", "a": "x"}, "q", "empty prompt"),
        ({"q": "x", "a": None}, "a", "null text"),
        ({"q": "x", "a": ""}, "a", "empty answer"),
        ({"q": "x", "a": 42}, "a", "wrong type"),
        ({"q": "x", "a": True}, "a", "wrong type"),
        ({"q": "x"}, "a", "null text"),
    ],
)
def test_malformed_pairs(row, field, what):
    with pytest.raises(RowError) as caught:
        convert_conversation(row, PAIR, "answers")
    assert (caught.value.field, caught.value.reason) == (field, what)


@pytest.mark.parametrize(
    ("value", "what"),
    [(None, "null text"), ("", "empty text"), (" \n", "empty text"), (1, "wrong type")],
)
def test_malformed_text(value, what):
    with pytest.raises(RowError) as caught:
        convert_text({"text": value}, {"text": "text"})
    assert (caught.value.field, caught.value.reason) == ("text", what)


# --- through a file -------------------------------------------------------------------------------


def test_the_error_names_row_and_field(tmp_path):
    rows = chats(5)
    rows[2]["messages"][1]["role"] = "robot"
    rows[4]["messages"][1]["content"] = ""
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError) as caught:
        load(path)
    first, second, last = str(caught.value).splitlines()
    assert first.startswith(f"{path}:3: messages[1].role: unknown role ('robot'; known: ")
    assert second == f"{path}:5: messages[1]: empty answer."
    assert last == "2 of 5 rows cannot be learnt from. Mend them, or set data.invalid: drop."


def test_dropped_rows_are_counted_by_reason_and_the_sums_add_up(tmp_path):
    rows = chats(8)
    rows[2]["messages"] = []
    rows[3]["messages"][1]["content"] = ""
    rows[6]["messages"][1]["content"] = "  "
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    loaded = load(path, invalid="drop")
    (report,) = loaded.reports
    assert report.dropped == {
        f"empty conversation (first: {path}:3)": 1,
        f"empty answer (first: {path}:4)": 2,
    }
    assert report.rows == 8 == report.used + sum(report.dropped.values())
    kept = [turns(row)[0][1] for row in loaded.train]
    assert kept == [f"question {n}" for n in (0, 1, 4, 5, 7)]


def test_what_a_method_does_not_take_is_refused(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time.")
    with pytest.raises(
        UserError, match=r"the rows are plain text .* this method takes conversation"
    ):
        load(path, examples=Examples(kinds=("conversation",)))


def test_prompts_without_answers_serve_where_all_is_learnt(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"messages": [user()]}])
    with pytest.raises(UserError, match="no assistant turn"):
        load(path)
    assert load(path, train_on_prompts=True).reports[0].used == 1
    assert load(path, examples=Examples(supervise="all")).reports[0].used == 1
