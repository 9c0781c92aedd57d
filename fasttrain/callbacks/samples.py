"""Lets the model write while it learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fasttrain.callbacks.held_out import require_held_out
from fasttrain.callbacks.human import shorten
from fasttrain.callbacks.prompts import chat_prompt
from fasttrain.callbacks.screen import LABEL_WIDTH, section
from fasttrain.config.schema.callback import SamplesConfig
from fasttrain.core.data_report import DataReport
from fasttrain.core.events import Callback, EvaluationRecord
from fasttrain.runtime.log import output
from fasttrain.runtime.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from fasttrain.core.run import Run

WIDTH = 140  # characters of a text that are shown


class Samples(Callback):
    """Prints what the model writes before training, at evaluations and at the end.

    Training does not notice: the random states and the modules' modes are put back.
    """

    Config = SamplesConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or SamplesConfig())
        self.prompts: list[tuple[str, str | None]] = []  # with template; what was expected
        self.before: dict[str, str] = {}  # prompt → what was written before the first step
        self.latest: list[str] = []
        self.latest_step = -1

    def on_data_ready(self, run: Run, record: DataReport) -> None:
        if not self.config.prompts:
            require_held_out(record, "samples")

    def on_train_start(self, run: Run, record: None) -> None:
        self.prompts = self._prompts(run)
        self._write(run)
        written = dict(zip((prompt for prompt, _ in self.prompts), self.latest, strict=True))
        if self.before.keys() != written.keys():
            self.before = written
            output().print(
                *self._block(f"step {run.step}", ("writes", self.latest)), indent=LABEL_WIDTH
            )

    def on_evaluation_end(self, run: Run, record: EvaluationRecord) -> None:
        if record.step == self.latest_step:
            return
        self._write(run)
        lines = [f"{number} now     {_shown(text)}" for number, text in enumerate(self.latest, 1)]
        output().print(*section("samples", lines), indent=LABEL_WIDTH)

    def on_train_end(self, run: Run, record: None) -> None:
        # A run that was told to leave has no time for this.
        if not run.finished or run.steps_this_process == 0:
            return
        self._write(run)
        before = [self.before[prompt] for prompt, _ in self.prompts]
        output().print(
            *self._block(f"step {run.step}", ("before", before), ("now", self.latest)),
            indent=LABEL_WIDTH,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]

    def _prompts(self, run: Run) -> list[tuple[str, str | None]]:
        if self.config.prompts:
            return [(chat_prompt(run.tokenizer, text), None) for text in self.config.prompts]
        assert run.data.evaluation is not None, "refused in on_data_ready"
        return list(run.data.evaluation.prompts(self.config.num_prompts))

    def _write(self, run: Run) -> None:
        if run.step == self.latest_step:
            return
        with run.engine.evaluation_weights(), undisturbed(run.model):
            self.latest = run.model.generate(
                [prompt for prompt, _ in self.prompts],
                tokenizer=run.tokenizer,
                max_new_tokens=self.config.max_new_tokens,
            )
        self.latest_step = run.step

    def _block(self, when: str, *columns: tuple[str, list[str]]) -> list[Any]:
        lines = [when]
        for number, (prompt, expected) in enumerate(self.prompts, 1):
            lines.append(f"{number} prompt  {_shown(prompt)}")
            if expected is not None:
                lines.append(f"  answer  {_shown(expected)}")
            lines += [f"  {label:<8}{_shown(texts[number - 1])}" for label, texts in columns]
        return section("samples", lines)


def _shown(text: str) -> str:
    return shorten(text, WIDTH) or "(nothing)"


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode without gradients; afterwards all is as before."""
    states = random_state()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(states)
