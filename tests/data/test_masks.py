"""Exactly the assistant's turns and their end tokens are supervised, whatever the template."""

from dataclasses import replace

import chats
import pytest

from fasttrain.data.conversation import Conversation, Message
from fasttrain.data.encode import EncodeOptions, Encoder
from fasttrain.data.template import ChatTemplate

OPTIONS = EncodeOptions(max_length=4096, overlong="error", invalid="error", supervise_all=False)


def encode(family, messages, kind=chats.byte_level, **options):
    """A conversation's tokens and mask, through the encoder that training uses."""
    tokenizer = chats.tokenizer(family, kind)
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer), replace(OPTIONS, **options))
    rows = {
        "kind": ["conversation"],
        "messages": [Conversation(tuple(messages)).to_json()],
        "text": [""],
        "source": ["test"],
        "origin": ["test.jsonl:7"],
    }
    return encoder.encode(rows, 0)


def pieces(family, messages, kind=chats.byte_level, *, flag=True, **options):
    """The runs of tokens that are supervised (or are not), each decoded."""
    chunk = encode(family, messages, kind, **options)
    assert not chunk.problems, chunk.problems
    tokenizer, found, run = chats.tokenizer(family, kind), [], []
    for token, supervised in zip(chunk.tokens[0], chunk.supervised[0], strict=True):
        if supervised == flag:
            run.append(int(token))
        elif run:
            found, run = [*found, tokenizer.decode(run)], []
    return [*found, tokenizer.decode(run)] if run else found


def system(content):
    return Message("system", content)


def user(content):
    return Message("user", content)


def assistant(content, **more):
    return Message("assistant", content, **more)


def tool(content):
    return Message("tool", content, name="weather", tool_call_id="abc")


def call(**arguments):
    function = {"name": "weather", "arguments": arguments}
    return ({"type": "function", "id": "abc", "function": function},)


# The answers also stand in the prompts, and the second one in the first.
THREE_TURNS = [
    user("Answer yes or no."),
    assistant("yes"),
    user("You said yes. Is yes or no the answer?"),
    assistant("yes or no"),
    user("yes"),
    assistant("no"),
]

# Family → the three turns, with what ends them and what the template puts before them.
ENDS = {
    "CHATML": ["yes<|im_end|>", "yes or no<|im_end|>", "no<|im_end|>"],
    "CHATML_WITHOUT_PROMPT": ["yes<|im_end|>", "yes or no<|im_end|>", "no<|im_end|>"],
    "QWEN3": [
        "yes<|im_end|>",
        "yes or no<|im_end|>",
        "<think>\n\n</think>\n\nno<|im_end|>",
    ],
    "LLAMA3": ["yes<|eot_id|>", "yes or no<|eot_id|>", "no<|eot_id|>"],
    "LLAMA2": [" yes </s>", " yes or no </s>", " no </s>"],
    "MISTRAL": [" yes</s>", " yes or no</s>", " no</s>"],
    "GEMMA": ["yes<end_of_turn>", "yes or no<end_of_turn>", "no<end_of_turn>"],
    "PHI3": ["yes<|end|>", "yes or no<|end|>", "no<|end|><|endoftext|>"],
    "ZEPHYR": ["yes</s>", "yes or no</s>", "no</s>"],
    "ALPACA": ["yes\n\n", "yes or no\n\n", "no\n\n</s>"],
    "GLM": ["yes", "yes or no", "no<|endoftext|>"],
    "DEEPSEEK": ["yes</s>", "yes or no</s>", "no</s>"],
    "HARMONY": [
        "<|channel|>final<|message|>yes<|end|>",
        "<|channel|>final<|message|>yes or no<|end|>",
        "<|channel|>final<|message|>no<|return|>",
    ],
    "COMMAND": ["yes<|SAID|><|END|>", "yes or no<|SAID|><|END|>", "no<|SAID|><|END|>"],
    "GEMMA4": ["yes<turn|>", "yes or no<turn|>", "no<turn|>"],
    "MARKED": ["yes<|im_end|>", "yes or no<|im_end|>", "no<|im_end|>"],
}


@pytest.mark.parametrize("name", ENDS)
def test_exactly_the_answers_and_their_ends(name):
    assert pieces(getattr(chats, name), THREE_TURNS) == ENDS[name]


KINDS = [chats.byte_level_trimmed, chats.sentencepiece_bpe, chats.unigram]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENDS)
def test_whatever_the_kind_of_tokenizer(name, kind):
    """Blanks aside, which decoders add and drop."""
    found = ["".join(piece.split()) for piece in pieces(getattr(chats, name), THREE_TURNS, kind)]
    assert found == ["".join(piece.split()) for piece in ENDS[name]]


@pytest.mark.parametrize("name", ENDS)
def test_the_rest_is_all_there_and_not_supervised(name):
    family = getattr(chats, name)
    prompts = "".join(pieces(family, THREE_TURNS, flag=False))
    for question in (THREE_TURNS[0], THREE_TURNS[2], THREE_TURNS[4]):
        assert question.content in prompts


@pytest.mark.parametrize("name", ENDS)
def test_tokens_are_those_of_the_template(name):
    """Nothing but an end that the template forgot is added to what transformers makes."""
    family = getattr(chats, name)
    tokenizer = chats.tokenizer(family)
    dicts = [{"role": m.role, "content": m.content} for m in THREE_TURNS]
    expected = tokenizer.apply_chat_template(dicts, tokenize=True, return_dict=False)
    tokens = encode(family, THREE_TURNS).tokens[0].tolist()
    added = [tokenizer.eos_token_id] if name in ("ALPACA", "GLM") else []
    assert tokens == [*expected, *added]


TRIMMING = ["LLAMA3", "LLAMA2", "MISTRAL", "GEMMA", "MARKED"]


@pytest.mark.parametrize("name", TRIMMING)
def test_a_template_that_strips_blanks_changes_nothing(name):
    """Blanks around an answer vanish in the rendering; the mask is that of the answer without."""
    family = getattr(chats, name)
    padded = [
        assistant(f" \n {m.content}\n\n") if m.role == "assistant" else m for m in THREE_TURNS
    ]
    plain, stripped = encode(family, THREE_TURNS), encode(family, padded)
    assert stripped.tokens[0].tolist() == plain.tokens[0].tolist()
    assert stripped.supervised[0].tolist() == plain.supervised[0].tolist()


def test_blanks_that_a_template_keeps_belong_to_the_answer():
    learnt = pieces(chats.CHATML, [user("?"), assistant("  four \n")])
    assert learnt == ["  four \n<|im_end|>"]


def test_text_that_the_tokenizer_does_not_know_ends_no_turn():
    """Its token is a special one too."""
    chunk = encode(chats.ALPACA, [user("?"), assistant("日本")], chats.sentencepiece_bpe)
    first = chunk.supervised[0].tolist().index(True)
    assert all(chunk.supervised[0][first:]), "the blanks before the added end are learnt"


@pytest.mark.parametrize("kind", [chats.byte_level, *KINDS])
def test_a_header_that_swallows_the_answers_first_blanks_is_not_learnt(kind):
    [learnt] = pieces(chats.PHI3, [user("?"), assistant(" \n four")], kind)
    assert "".join(learnt.split()) == "four<|end|><|endoftext|>"


def test_a_token_across_the_boundary_belongs_to_the_turn_it_ends_in():
    """The template's line break and the answer's own are one token here."""

    def with_double_break():
        backend = chats.byte_level()
        backend.add_tokens(["\n\n"])
        return backend

    learnt = pieces(chats.CHATML, [user("?"), assistant("\nfour")], with_double_break)
    assert learnt == ["\n\nfour<|im_end|>"]


@pytest.mark.parametrize("name", ["CHATML", "QWEN3", "LLAMA3", "PHI3", "ZEPHYR", "HARMONY"])
def test_a_system_message_is_not_learnt(name):
    family = getattr(chats, name)
    chat = [system("Answer yes or no."), *THREE_TURNS]
    assert pieces(family, chat) == ENDS[name]


@pytest.mark.parametrize("name", ["LLAMA2", "MISTRAL"])
def test_a_system_message_inside_a_question_is_not_learnt(name):
    """MISTRAL moves it to the last question, so that no beginning renders as in the whole."""
    family = getattr(chats, name)
    chat = [system("Answer yes or no."), *THREE_TURNS]
    assert pieces(family, chat) == ENDS[name]
    assert "Answer yes or no." in "".join(pieces(family, chat, flag=False))


def test_thoughts_are_learnt_where_the_template_shows_them():
    chat = [
        user("Capital of France?"),
        assistant("Paris", reasoning="It is Paris."),
        user("Sure?"),
        assistant("yes", reasoning="They ask again."),
    ]
    assert pieces(chats.QWEN3, chat) == [
        "Paris<|im_end|>",  # the template drops earlier thoughts
        "<think>\nThey ask again.\n</think>\n\nyes<|im_end|>",
    ]
    assert pieces(chats.HARMONY, chat) == [
        "<|channel|>final<|message|>Paris<|end|>",
        "<|channel|>analysis<|message|>They ask again.<|end|><|start|>assistant"
        "<|channel|>final<|message|>yes<|return|>",
    ]


def test_thoughts_that_the_prompt_would_rule_out():
    """The prompt closes the thoughts, so that no answer that has some begins with it."""
    template = chats.QWEN3.template.replace(
        "{{- '<|im_start|>assistant\n' -}}{%- endif -%}\n",
        "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' -}}{%- endif -%}\n",
    )
    assert template != chats.QWEN3.template
    family = replace(chats.QWEN3, template=template)
    chat = [user("?"), assistant("four", reasoning="Hm."), user("!"), assistant("no")]
    assert pieces(family, chat) == ["four<|im_end|>", "no<|im_end|>"]
    assert pieces(family, chat[:2]) == ["Hm.\n</think>\n\nfour<|im_end|>"]


def test_thoughts_inside_the_content_that_a_template_cuts_off():
    chat = [user("?"), assistant("<think>\nhm\n</think>four"), user("!"), assistant("</think>no")]
    assert pieces(chats.DEEPSEEK, chat) == ["four</s>", "no</s>"]


def test_an_answer_of_which_nothing_is_left_is_refused():
    [problem] = encode(chats.DEEPSEEK, [user("?"), assistant("<think>hm</think>")]).problems
    assert "message 2 (assistant)" in str(problem)


def test_tool_calls_are_learnt_and_their_results_are_not():
    chat = [
        user("Weather in Paris?"),
        assistant("", tool_calls=call(city="Paris")),
        tool("rain in Paris"),
        tool("four degrees"),
        assistant("It rains.", reasoning="Rain."),
        user("And in Rome?"),
        assistant("I look.", tool_calls=call(city="Rome")),
        tool("sun"),
        assistant("Sun."),
    ]
    body = (
        '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call><|im_end|>'
    )
    assert pieces(chats.QWEN3, chat) == [
        body.format("Paris"),
        "It rains.<|im_end|>",
        "I look.\n" + body.format("Rome"),
        "<think>\n\n</think>\n\nSun.<|im_end|>",
    ]
    short = [chat[0], replace(chat[1], content=None), chat[2], assistant("It rains.")]
    assert pieces(chats.MISTRAL, short) == [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>',
        " It rains.</s>",
    ]


def test_a_template_without_tools_is_refused_where_an_answer_calls_one():
    chat = [user("Weather?"), assistant("I look.", tool_calls=call(city="Rome"))]
    [problem] = encode(chats.CHATML, chat).problems
    assert "message 2 (assistant)" in str(problem)


def test_a_tools_result_inside_the_turn_is_never_learnt():
    """The turn can't be told from the result that the template puts into it."""
    chat = [
        user("Weather?"),
        assistant("It rains.", tool_calls=call(city="Rome")),
        tool("rain in Rome"),
        user("Thanks."),
        assistant("yes"),
    ]
    [problem] = encode(chats.GEMMA4, chat).problems
    assert "message 2 (assistant)" in str(problem)


def test_marks_of_the_template_stand_whatever_blanks_surround_them():
    chat = [user("yes"), assistant("  yes  ")]
    variants = [
        chats.MARKED.template,
        chats.MARKED.template.replace("{%- generation %}", "{% generation -%}"),
        # Captured and trimmed before it is written.
        chats.MARKED.template.replace("{%- generation %}", "{% set x %}{% generation %}").replace(
            "{%- endgeneration %}", "{% endgeneration %}{% endset %}{{- x | trim }}"
        ),
    ]
    for template in variants:
        learnt = pieces(replace(chats.MARKED, template=template), chat)
        assert learnt == ["yes<|im_end|>"]


def test_marks_decide_what_is_the_assistants():
    """A template that leaves the thought unmarked does not have it learnt."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think>hm</think>' }}"
        "{% generation %}{{ m.content }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    family = replace(chats.CHATML, template=template)
    assert pieces(family, THREE_TURNS) == ENDS["CHATML"]


def test_marks_without_an_end_of_turn():
    """The next header is no end; the last answer gets one, and the blanks before it are learnt."""
    template = chats.GLM.template.replace(
        "'<|' + m.role + '|>\n' + m.content }}",
        "'<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '\n' if loop.last }}",
    )
    learnt = pieces(replace(chats.GLM, template=template), THREE_TURNS)
    assert learnt == ["yes", "yes or no", "no\n<|endoftext|>"]


def test_marks_around_a_header_are_taken_out_with_their_turn():
    template = chats.CHATML.template.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}",
    )
    chat = [user("?"), assistant("yes", train=False), user("!"), assistant("no")]
    learnt = pieces(replace(chats.CHATML, template=template), chat)
    assert learnt == ["<|im_start|>assistant\nno<|im_end|>"]


def test_marks_around_an_answer_that_is_left_out_are_refused():
    template = chats.MARKED.template.replace("m.content | trim", "''")
    [problem] = encode(replace(chats.MARKED, template=template), THREE_TURNS).problems
    assert "message 2 (assistant)" in str(problem)


@pytest.mark.parametrize("name", ENDS)
def test_turns_can_be_taken_out(name):
    """`train: false` on the first and the last answer leaves the middle one."""
    family = getattr(chats, name)
    chat = list(THREE_TURNS)
    chat[1] = replace(chat[1], train=False)
    chat[5] = replace(chat[5], train=False)
    assert pieces(family, chat) == [ENDS[name][1]]


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "MARKED", "ZEPHYR"])
def test_a_question_can_be_put_in(name):
    family = getattr(chats, name)
    chat = [user("What is the capital?"), replace(user("yes"), train=True), assistant("no")]
    [question, answer] = pieces(family, chat)
    assert question.startswith("yes") and "What" not in question
    assert answer == ENDS[name][2]


@pytest.mark.parametrize("name", ENDS)
def test_everything_can_be_supervised_but_what_is_taken_out(name):
    family = getattr(chats, name)
    everything = encode(family, THREE_TURNS, supervise_all=True)
    assert everything.supervised[0].tolist() == [False] + [True] * (len(everything.tokens[0]) - 1)
    chat = list(THREE_TURNS)
    chat[3] = replace(chat[3], train=False)
    [taken] = [p for p in pieces(family, chat, flag=False, supervise_all=True) if "yes or no" in p]
    assert taken.strip() == ENDS[name][1].strip()


def test_an_answer_that_merges_with_the_next_one():
    """Two answers in a row, which the template writes as one turn."""
    template = (
        "{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% else %}{{ ' ' }}{% endif %}{{ m.content }}"
        "{% if loop.last or m.role != messages[loop.index0 + 1].role %}{{ '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = [user("?"), assistant("yes"), assistant("no"), user("!"), assistant("yes")]
    learnt = pieces(replace(chats.CHATML, template=template), chat)
    assert learnt == ["yes no<|im_end|>", "yes<|im_end|>"] or learnt == [
        "yes",
        " no<|im_end|>",
        "yes<|im_end|>",
    ]


UNSOUND = {
    "drops the answer": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "says it twice": "{{ messages[-1].content }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    "shows it upside down": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content | reverse | join if loop.index0 == 1 else m.content }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{{ messages | length }}",
    "counts its letters": "{% for m in messages %}{{ messages[1].content | length }}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | upper + '<|im_end|>\n' }}{% endfor %}",
}


@pytest.mark.parametrize("name", UNSOUND)
def test_a_rendering_in_which_a_turn_cannot_be_told_is_refused(name):
    family = replace(chats.CHATML, template=UNSOUND[name])
    chunk = encode(family, THREE_TURNS)
    [problem] = chunk.problems
    assert str(problem).startswith("test.jsonl:7: tokenizer.chat_template: message ")
    assert "generation" in str(problem)
    assert not chunk.tokens
    dropped = encode(family, THREE_TURNS, invalid="drop")
    assert not dropped.problems and dropped.tally.dropped.total() == 1


def test_what_the_template_refuses_is_said_with_the_row():
    chat = [system("Be terse."), user("?"), assistant("four")]
    [problem] = encode(chats.GEMMA, chat).problems
    assert "test.jsonl:7" in str(problem) and "System role not supported" in str(problem)
    [problem] = encode(chats.LLAMA2, [user("a"), user("b"), assistant("c")]).problems
    assert "roles must alternate" in str(problem)


def test_a_conversation_that_ends_with_a_question_is_learnt_up_to_its_last_answer():
    chat = [*THREE_TURNS, user("Thanks.")]
    assert pieces(chats.LLAMA3, chat) == ENDS["LLAMA3"]
    assert pieces(chats.GLM, chat) == ["yes", "yes or no", "no"]


def test_a_conversation_that_begins_with_an_answer():
    chat = [assistant("Answer yes or no."), user("yes"), assistant("no")]
    assert pieces(chats.CHATML, chat) == ["Answer yes or no.<|im_end|>", "no<|im_end|>"]
    assert pieces(chats.MARKED, chat) == ["Answer yes or no.<|im_end|>", "no<|im_end|>"]


def encode_with_offsets(change):
    """THREE_TURNS through a tokenizer whose (id, offset) pairs are changed."""

    class Changed(type(chats.tokenizer(chats.CHATML))):
        def __call__(self, texts, **options):
            encoded = super().__call__(texts, **options)
            ids, offsets = encoded["input_ids"][0], encoded["offset_mapping"][0]
            offsets[:] = [change(*pair) for pair in zip(ids, offsets, strict=True)]
            return encoded

    honest = chats.tokenizer(chats.CHATML)
    tokenizer = Changed(
        tokenizer_object=honest.backend_tokenizer,
        eos_token=honest.eos_token,
        chat_template=honest.chat_template,
    )
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer), OPTIONS)
    rows = {
        "kind": ["conversation"],
        "messages": [Conversation(tuple(THREE_TURNS)).to_json()],
        "text": [""],
        "source": ["test"],
        "origin": ["test.jsonl:7"],
    }
    return encoder.encode(rows, 0)


def test_offsets_that_lie_are_found_out():
    chunk = encode_with_offsets(lambda _, span: (max(span[0] - 3, 0), max(span[1] - 3, 0)))
    [problem] = chunk.problems
    assert "offsets do not agree" in str(problem)


def test_special_tokens_without_offsets_are_found_out():
    special = chats.tokenizer(chats.CHATML).convert_tokens_to_ids(list(chats.CHATML.special))
    chunk = encode_with_offsets(lambda token, span: (0, 0) if token in special else span)
    [problem] = chunk.problems
    assert "offsets do not agree" in str(problem)
