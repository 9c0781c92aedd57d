"""Chat templates in the manner of the common families, and small tokenizers that carry them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "You are terse. Answer yes or no. What is the capital of France? Paris. The answer is four.",
    "system user assistant tool model response instruction tool_call think arguments name weather",
] * 3
ASCII = ["\n", *map(chr, range(33, 127))]


@dataclass(frozen=True)
class Family:
    """A template, the tokens that control its model, and which of them ends a text."""

    template: str
    special: tuple[str, ...]
    eos: str
    strips_after: bool = False  # special tokens swallow the blanks behind them (AddedToken.rstrip)


def byte_level() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer=trainer)
    return backend


def byte_level_trimmed() -> Tokenizer:
    """Its offsets leave out the blank in front of a word."""
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2: a blank is put before every piece of text between special tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], initial_alphabet=ASCII, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer=trainer)
    return backend


def unigram() -> Tokenizer:
    """As T5 and XLNet."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        initial_alphabet=ASCII,
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer=trainer)
    return backend


@cache
def tokenizer(
    family: Family, kind: Callable[[], Tokenizer] = byte_level
) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, with some merges, so that tokens straddle what they can."""
    backend = kind()
    backend.add_special_tokens(
        [AddedToken(token, rstrip=family.strips_after, special=True) for token in family.special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if "<s>" in family.special else None,
        unk_token="<unk>" if backend.token_to_id("<unk>") is not None else None,
        eos_token=family.eos,
        chat_template=family.template,
    )


CHATML = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "<|im_end|>",
)

# No word about add_generation_prompt.
CHATML_WITHOUT_PROMPT = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}",
    CHATML.special,
    CHATML.eos,
)

# Thoughts of earlier turns are dropped, the last answer always has a place for them, the results
# of tools are gathered in one user turn.
QWEN3 = Family(
    """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) -%}
      {{- '<think>\n' + (m.reasoning_content or '') | trim + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- m.content or '' -}}
    {%- for call in m.tool_calls or [] -%}
      {%- if m.content or not loop.first -%}{{- '\n' -}}{%- endif -%}
      {{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|im_start|>user' -}}
    {%- endif -%}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
      {{- '<|im_end|>\n' -}}
    {%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""",
    CHATML.special,
    CHATML.eos,
)

# Contents are trimmed; the system message carries the date.
LLAMA3 = Family(
    """{{- '<s>' -}}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}{%- set rest = messages -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') -}}
{{- '\n\n' + system + '<|eot_id|>' -}}
{%- for m in rest -%}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
""",
    ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    "<|end_of_text|>",
)

# Nothing opens an answer; roles have to alternate.
LLAMA2 = Family(
    """{%- if messages[0].role == 'system' -%}
  {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
  {%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate user/assistant') -}}
  {%- endif -%}
  {%- if m.role == 'user' -%}
    {{- '<s>[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + m.content | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
""",
    ("<s>", "</s>"),
    "</s>",
)

# The system message is put into the last question, wherever that is; turns have to alternate.
MISTRAL = Family(
    """{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = none -%}{%- set rest = messages -%}
{%- endif -%}
{%- set questions = rest | selectattr('role', 'equalto', 'user') | list -%}
{{- '<s>' -}}
{%- set ns = namespace(turns=0) -%}
{%- for m in rest -%}
  {%- if m.role == 'user' or m.role == 'assistant' and not m.tool_calls -%}
    {%- if (m.role == 'user') != (ns.turns % 2 == 0) -%}
      {{- raise_exception('roles must alternate') -}}
    {%- endif -%}
    {%- set ns.turns = ns.turns + 1 -%}
  {%- endif -%}
  {%- if m.role == 'user' -%}
    {%- if system is not none and m == questions[-1] -%}
      {{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' -}}
    {%- else -%}
      {{- '[INST] ' + m.content + '[/INST]' -}}
    {%- endif -%}
  {%- elif m.tool_calls -%}
    {{- '[TOOL_CALLS] ' + (m.tool_calls | map(attribute='function') | list | tojson) + '</s>' -}}
  {%- elif m.role == 'tool' -%}
    {{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' -}}
  {%- else -%}
    {{- ' ' + m.content | trim + '</s>' -}}
  {%- endif -%}
{%- endfor -%}
""",
    (
        *("<s>", "</s>", "[INST]", "[/INST]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "</s>",
)

# No system message; the assistant is called model.
GEMMA = Family(
    """{{- '<s>' -}}
{%- if messages[0].role == 'system' -%}
  {{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- for m in messages -%}
  {%- set role = 'model' if m.role == 'assistant' else m.role -%}
  {{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
""",
    ("<s>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
    "<eos>",
)

# Special tokens swallow the line break behind them; a whole text ends with a token of its own.
PHI3 = Family(
    """{%- for m in messages -%}
  {{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
""",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    "<|endoftext|>",
    strips_after=True,
)

# Headers are plain text.
ZEPHYR = Family(
    """{% for m in messages %}
{{ '<|' + m.role + '|>\n' + m.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
    ("</s>",),
    "</s>",
)

# Nothing in it is special, so that nothing ends a turn.
ALPACA = Family(
    """{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{- '### Instruction:\n' + m.content + '\n\n' -}}
  {%- elif m.role == 'assistant' -%}{{- '### Response:\n' + m.content + '\n\n' -}}
  {%- else -%}{{- m.content + '\n\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
""",
    ("</s>",),
    "</s>",
)

# A turn ends where the next one's header begins.
GLM = Family(
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
    "<|endoftext|>",
)

# The prompt already begins the thought; what was thought is dropped from every turn.
DEEPSEEK = Family(
    """{{- '<s>' -}}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{{- m.content -}}
  {%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}
  {%- else -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '</s>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}
""",
    ("<s>", "</s>", "<|User|>", "<|Assistant|>"),
    "</s>",
)

# Another token ends the last answer than the earlier ones; thoughts stand in a channel of theirs.
HARMONY = Family(
    """{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- if m.reasoning_content and loop.last -%}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' -}}
    {%- endif -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
    {{- '<|return|>' if loop.last else '<|end|>' -}}
  {%- else -%}
    {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
""",
    ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    "<|return|>",
)

# Says itself what the assistant writes, the end of the turn aside.
MARKED = Family(
    """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}
        {{- m.content | trim }}
        {%- endgeneration %}
    {%- else %}
        {{- m.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""",
    CHATML.special,
    CHATML.eos,
)

# Opens the assistant's turn behind whatever was said last, asked or not; ends it with two tokens.
COMMAND = Family(
    """{{- '<s>' -}}
{%- for m in messages -%}
  {{- '<|START|><|' + m.role | upper + '|>' -}}
  {%- if m.role == 'assistant' -%}{{- '<|SAY|>' + m.content + '<|SAID|>' -}}
  {%- else -%}{{- m.content -}}{%- endif -%}
  {{- '<|END|>' -}}
{%- endfor -%}
{{- '<|START|><|ASSISTANT|>' -}}
{%- if add_generation_prompt -%}{{- '<|SAY|>' -}}{%- endif -%}
""",
    (
        *("<s>", "<|START|>", "<|END|>", "<|SAY|>", "<|SAID|>"),
        *("<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"),
    ),
    "<|END|>",
)

# Puts the results of tools into the turn that called them, before what is said there.
GEMMA4 = Family(
    """{{- '<s>' -}}
{%- for m in messages if m.role != 'tool' -%}
  {{- '<|turn>' + m.role + '\n' -}}
  {%- for call in m.tool_calls or [] -%}
    {{- '<|call>' + call.function.name + '<call|>' -}}
    {%- for r in messages if r.role == 'tool' -%}{{- '<|result>' + r.content -}}{%- endfor -%}
  {%- endfor -%}
  {{- (m.content or '') + '<turn|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>assistant\n' -}}{%- endif -%}
""",
    ("<s>", "<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>"),
    "<turn|>",
)
