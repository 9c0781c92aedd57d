"""A question as the model was taught to read it."""

from __future__ import annotations

from typing import Any


def chat_prompt(tokenizer: Any, text: str) -> str:
    """`text` as a user's turn in the tokenizer's chat template, or as it is where there is none."""
    if not tokenizer.chat_template:
        return text
    prompt: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return prompt
