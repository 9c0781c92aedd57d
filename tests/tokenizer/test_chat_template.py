"""Where a chat template comes from, and what is said when there is none."""

import chats
import pytest

from fasttrain.config.errors import UserError
from fasttrain.tokenizer.chat_template import built_in_templates, read_template, set_chat_template

CHAT = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "four"},
]


def fresh():
    """A tokenizer of its own, without a template."""
    tokenizer = chats.tokenizer(chats.CHATML)
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")


def test_chatml_comes_with_fasttrain():
    assert "chatml" in built_in_templates()
    tokenizer = fresh()
    set_chat_template(tokenizer, "chatml", needed=True)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_writes_thoughts_calls_and_results():
    tokenizer = fresh()
    set_chat_template(tokenizer, "chatml", needed=True)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    rendered = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "tool_calls": [call, call], "reasoning_content": "Add."},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "four"},
        ],
        tokenize=False,
    )
    body = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert rendered == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nAdd.\n</think>\n\n{body}\n{body}<|im_end|>\n"
        "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    )


def test_a_template_can_be_a_file_or_the_text_itself(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}", encoding="utf-8")
    assert read_template(str(path)) == "{{ messages[0].content }}"
    assert read_template("{% for m in messages %}{% endfor %}").startswith("{% for")
    tokenizer = fresh()
    set_chat_template(tokenizer, str(path), needed=True)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "Be terse."


def test_the_tokenizers_own_is_kept():
    tokenizer = chats.tokenizer(chats.LLAMA3)
    set_chat_template(tokenizer, None, needed=True)
    assert tokenizer.chat_template == chats.LLAMA3.template


def test_without_one_conversations_are_refused_and_texts_are_not():
    with pytest.raises(UserError, match=r"tokenizer.chat_template: .* Set it to chatml"):
        set_chat_template(fresh(), None, needed=True)
    set_chat_template(fresh(), None, needed=False)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("chatmal", "'chatmal' is neither a built-in template nor a file. Built-in: chatml"),
        ("{% for m in messages %}\n{{ m.content }", "line 2 of the template: "),
        ("{{ 1 }}{% nonsense %}", "line 1 of the template: Encountered unknown tag 'nonsense'"),
    ],
)
def test_what_is_wrong_with_a_template(choice, says):
    with pytest.raises(UserError) as caught:
        set_chat_template(fresh(), choice, needed=True)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "latin.jinja"
    path.write_bytes("{{ 'é' }}".encode("latin-1"))
    for bad in (path, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_template(str(bad))


def test_a_template_that_refuses_one_question_is_no_error():
    template = "{{ raise_exception('a system message must come first') }}"
    set_chat_template(fresh(), template, needed=True)
