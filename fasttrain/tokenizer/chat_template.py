"""Which chat template a tokenizer uses: its own, a built-in, a file, or text in the config."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from fasttrain.config.errors import Problem, UserError

KEY = "tokenizer.chat_template"
_FOLDER = resources.files("fasttrain.tokenizer") / "templates"


def built_in_templates() -> list[str]:
    """Names of the templates that come with fasttrain."""
    return sorted(
        entry.name.removesuffix(".jinja")
        for entry in _FOLDER.iterdir()
        if entry.name.endswith(".jinja")
    )


def set_chat_template(tokenizer: Any, choice: str | None, *, needed: bool) -> None:
    """Give `tokenizer` the template that `choice` names, or leave it its own.

    UserError where the template can't be found or parsed, or where none is there and the data need
    one.
    """
    if choice is not None:
        tokenizer.chat_template = read_template(choice)
        _refuse_bad_syntax(tokenizer, choice)
    elif needed and not tokenizer.chat_template:
        raise UserError(
            Problem(
                key=KEY,
                what="the data are conversations and the tokenizer has no chat template.",
                hint=f"Set it to {' or '.join(built_in_templates())}, to a .jinja file, "
                "or use a tokenizer of a chat model.",
            )
        )


def read_template(choice: str) -> str:
    """The template's text: `choice` is a built-in's name, a path, or the text itself."""
    if "{%" in choice or "{{" in choice:
        return choice
    if choice in built_in_templates():
        return (_FOLDER / f"{choice}.jinja").read_text(encoding="utf-8")
    path = Path(choice).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        what = f"'{choice}' is neither a built-in template nor a file."
        hint = f"Built-in: {', '.join(built_in_templates())}."
        raise UserError(Problem(key=KEY, what=what, hint=hint)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(where=choice, key=KEY, what=f"cannot be read: {error}.")) from error


def _refuse_bad_syntax(tokenizer: Any, choice: str) -> None:
    # The dialect is that of transformers (its own tags and filters), so it is what parses. A
    # template may well refuse this one message; whether it takes the data is seen row by row.
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        where = choice if "\n" not in choice and "{" not in choice else ""
        what = f"line {error.lineno} of the template: {error.message}."
        raise UserError(Problem(where=where, key=KEY, what=what)) from error
    except Exception:
        pass
