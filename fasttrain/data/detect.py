"""What a source's rows are, from the names of its columns and the values of its first rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.data import Columns
from fasttrain.data.columns import (
    CHOSEN_NAMES,
    HISTORY_NAMES,
    INPUT_NAMES,
    MESSAGES_NAMES,
    PAIRS,
    PROMPT_NAMES,
    REJECTED_NAMES,
    RESPONSE_NAMES,
    SYSTEM_NAMES,
    TEXT_NAMES,
    Sample,
)


@dataclass(frozen=True)
class Detected:
    """How rows are read: their kind, which column plays which role, and why, as a sentence."""

    kind: Literal["conversation", "text"]
    columns: Mapping[str, str]  # messages|system|prompt|input|response|history|text → column
    sentence: str


def detect(sample: Sample, given: Columns | None = None) -> Detected:
    """The format of a source; `given` wins where it says something.

    UserError where no format fits, where two do, and for preference pairs.
    """
    fixed = given.model_dump(exclude_none=True) if given is not None else {}
    _check_given(sample, fixed)
    if "text" in fixed:
        roles = {"text": fixed["text"]}
    elif "messages" in fixed:
        roles = {"messages": fixed["messages"]}
    elif "prompt" in fixed or "response" in fixed:
        roles = _complete_pair(sample, fixed)
    else:
        roles = _find(sample)
    roles = {**roles, **fixed}
    if "response" in roles:
        roles = _with_extras(sample, roles)
    elif "messages" in roles and "system" not in roles:
        roles.update(_system(sample, roles))
    return Detected(
        kind="text" if "text" in roles else "conversation",
        columns=roles,
        sentence=_sentence(sample, roles, by_config=bool(fixed)),
    )


def _check_given(sample: Sample, fixed: Mapping[str, str]) -> None:
    for role, column in fixed.items():
        if column not in sample.columns:
            raise UserError(
                Problem(
                    f"there is no column '{column}'. Columns found: {', '.join(sample.columns)}.",
                    key=f"{sample.key}.columns.{role}",
                )
            )
    for role in ("text", "messages"):
        others = [name for name in fixed if name not in (role, "system")]
        if role in fixed and (others or (role == "text" and "system" in fixed)):
            raise UserError(
                Problem(
                    f"{role} excludes {', '.join(name for name in fixed if name != role)}.",
                    key=f"{sample.key}.columns",
                )
            )


def _find(sample: Sample) -> dict[str, str]:
    """The roles of a source about which the config says nothing."""
    lists = [
        column
        for column in sample.columns
        if sample.is_messages(column)
        and column.lower() not in (*CHOSEN_NAMES, *REJECTED_NAMES, *PROMPT_NAMES, *RESPONSE_NAMES)
    ]
    if len(lists) > 1:
        raise _ambiguous(sample, [{"messages": column} for column in lists])
    if lists:
        return {"messages": lists[0]}
    pairs = _pairs(sample)
    if len(pairs) > 1:
        raise _ambiguous(sample, pairs)
    if pairs:
        return pairs[0]
    if sample.named(CHOSEN_NAMES) and sample.named(REJECTED_NAMES):
        raise _preference(sample)
    texts = [column for column in sample.named(TEXT_NAMES) if sample.is_text(column)]
    if not texts:
        texts = [column for column in sample.columns if sample.is_text(column)]
        if len(texts) > 1:
            raise _undetectable(sample)
    if not texts:
        raise _undetectable(sample)
    return {"text": texts[0]}


def _pairs(sample: Sample) -> list[dict[str, str]]:
    """Complete pairs. alpaca's `input` is no question of its own where there is an instruction."""
    found = [pair for pair in PAIRS if len(sample.named(pair)) == 2]
    if len(found) > 1:
        found = [pair for pair in found if pair[0] not in INPUT_NAMES] or found
    return [
        {"prompt": sample.by_name[prompt], "response": sample.by_name[response]}
        for prompt, response in found
    ]


def _complete_pair(sample: Sample, fixed: Mapping[str, str]) -> dict[str, str]:
    """The half of a pair that the config leaves out."""
    roles = dict(fixed)
    for role, names in (("prompt", PROMPT_NAMES), ("response", RESPONSE_NAMES)):
        if role in roles:
            continue
        free = [column for column in sample.named(names) if column not in fixed.values()]
        if len(free) > 1:
            free = [column for column in free if column.lower() not in INPUT_NAMES]
        if len(free) != 1:
            raise UserError(
                Problem(
                    f"which column is the {role}? Columns found: {', '.join(sample.columns)}.",
                    key=f"{sample.key}.columns.{role}",
                )
            )
        roles[role] = free[0]
    return roles


def _with_extras(sample: Sample, roles: Mapping[str, str]) -> dict[str, str]:
    """Further input, system prompt and history beside a pair."""
    extras: dict[str, str] = {}
    free = [column for column in sample.columns if column not in roles.values()]
    for column in sample.named(INPUT_NAMES):
        if "input" not in roles and column in free and sample.is_text(column):
            extras.setdefault("input", column)
    for column in sample.named(HISTORY_NAMES):
        if sample.type_of(column) == "list":
            extras["history"] = column
    if "system" not in roles:
        extras.update(_system(sample, roles))
    return {**roles, **extras}


def _system(sample: Sample, roles: Mapping[str, str]) -> dict[str, str]:
    for column in sample.named(SYSTEM_NAMES):
        if column not in roles.values() and sample.is_text(column):
            return {"system": column}
    return {}


# ---------------------------------------------------------------------------------- what users read


def _format_name(sample: Sample, roles: Mapping[str, str]) -> str:
    if "text" in roles:
        return "plain text"
    if "messages" in roles:
        values = sample.values(roles["messages"])
        first = values[0][0] if values and isinstance(values[0], list) and values[0] else {}
        share_gpt = isinstance(first, dict) and "from" in first
        return "ShareGPT conversations" if share_gpt else "conversations"
    names = (roles["prompt"].lower(), roles["response"].lower())
    return "alpaca" if names == ("instruction", "output") else "/".join(names)


def _sentence(sample: Sample, roles: Mapping[str, str], *, by_config: bool) -> str:
    order = ("system", "history", "messages", "prompt", "input", "response", "text")
    used = [roles[role] for role in order if role in roles]
    unused = [column for column in sample.columns if column not in used]
    sentence = f"{_format_name(sample, roles)} ({', '.join(used)}), "
    sentence += "as the config says" if by_config else _reason(roles)
    return f"{sentence}; not used: {', '.join(unused)}" if unused else sentence


def _reason(roles: Mapping[str, str]) -> str:
    if "messages" in roles:
        return "by its lists of messages"
    if "text" in roles and roles["text"].lower() not in TEXT_NAMES:
        return "the only column of text"
    return "by column name"


def _as_yaml(roles: Mapping[str, str]) -> str:
    return "columns: {" + ", ".join(f"{role}: {column}" for role, column in roles.items()) + "}"


def _found(sample: Sample) -> str:
    return ", ".join(f"{column} ({sample.type_of(column)})" for column in sample.columns)


def _ambiguous(sample: Sample, choices: list[dict[str, str]]) -> UserError:
    lines = " or ".join(_as_yaml(roles) for roles in choices)
    return UserError(
        Problem(
            f"more than one format fits the columns {_found(sample)}.",
            key=sample.key,
            hint=f"Say which is meant, under this source: {lines}.",
        )
    )


def _preference(sample: Sample) -> UserError:
    chosen = sample.named(CHOSEN_NAMES)[0]
    rejected = sample.named(REJECTED_NAMES)[0]
    prompts = sample.named(PROMPT_NAMES)
    roles = {"messages": chosen}
    if not sample.is_messages(chosen) and prompts:
        roles = {"prompt": prompts[0], "response": chosen}
    elif not sample.is_messages(chosen):
        roles = {"text": chosen}
    return UserError(
        Problem(
            f"the rows are preference pairs ({chosen}, {rejected}), not single answers.",
            key=sample.key,
            hint=f"To learn the chosen answers alone, add under this source: {_as_yaml(roles)}.",
        )
    )


def _undetectable(sample: Sample) -> UserError:
    if not sample.columns:
        return UserError(Problem("the rows have no columns.", key=sample.key))
    name, roles = _closest(sample)
    return UserError(
        Problem(
            f"cannot tell what the rows are; columns found: {_found(sample)}.",
            key=sample.key,
            hint=f"Closest is {name}; if so, add under this source: {_as_yaml(roles)}.",
        )
    )


def _closest(sample: Sample) -> tuple[str, dict[str, str]]:
    """The format whose column names are most like those found, and how they would be mapped."""
    guesses: list[tuple[float, str, dict[str, str]]] = []
    for names, role, name in (
        (MESSAGES_NAMES, "messages", "conversations"),
        (TEXT_NAMES, "text", "plain text"),
    ):
        score, column = _nearest(sample.columns, names)
        guesses.append((score, name, {role: column}))
    for prompt, response in PAIRS if len(sample.columns) > 1 else ():
        high, asked = _nearest(sample.columns, (prompt,))
        rest = tuple(column for column in sample.columns if column != asked)
        low, answered = _nearest(rest, (response,))
        roles = {"prompt": asked, "response": answered}
        guesses.append(((high + low) / 2, f"{prompt}/{response}", roles))
    _, name, roles = max(guesses, key=lambda guess: guess[0])
    return name, roles


def _nearest(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[float, str]:
    return max(
        (SequenceMatcher(None, column.lower(), name).ratio(), column)
        for column in columns
        for name in names
    )
