"""The user's mistakes, as one line each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong, where, and what to do.

    Reads `<where>: <key>: <what>. <hint>`, as `sft.yaml:7: optimizer.lr: …` or `train.jsonl:3: …`.
    """

    what: str
    where: str = ""  # file, or file:line, or "command line"
    key: str = ""  # key path or field
    hint: str = ""

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.key) if part)
        line = f"{place}: {self.what}" if place else self.what
        line = f"{line} {self.hint}" if self.hint else line
        # One line, whatever the values in it hold: line breaks, terminal codes.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class UserError(ValueError):
    """Something the user can mend. Carries every problem found; the command exits with code 2."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(
            Problem(what=problem) if isinstance(problem, str) else problem for problem in problems
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))
