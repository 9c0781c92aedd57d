"""What the model writes, and that training does not notice."""

import random

import numpy as np
import pytest
import torch
from fake_run import evaluation, make_run, report
from toys import ToyModel

from fasttrain.callbacks.samples import Samples
from fasttrain.config.errors import UserError
from fasttrain.config.schema.callback import SamplesConfig
from fasttrain.runtime import log


class Writer(ToyModel):
    """Writes how often it was asked; draws from every generator, as a sampling model may."""

    calls = 0

    def generate(self, prompts, *, tokenizer, max_new_tokens):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        random.random(), np.random.rand(), torch.rand(3)
        return [f"text {self.calls} for {prompt.strip()}" for prompt in prompts]


@pytest.fixture(autouse=True)
def fresh_output(monkeypatch):
    monkeypatch.setattr(log, "_output", None)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, model=Writer(), total_steps=20)


def test_before_during_and_after(run, capsys):
    samples = Samples(SamplesConfig(num_prompts=2))
    samples.on_data_ready(run, report())
    samples.on_train_start(run, None)
    assert capsys.readouterr().out == (
        "samples    step 0\n"
        "           1 prompt  ask↵\n"
        "             answer  say\n"
        "             writes  text 1 for ask\n"
        "           2 prompt  why↵\n"
        "             answer  so\n"
        "             writes  text 1 for why\n"
    )
    run.step = run.steps_this_process = 10
    samples.on_evaluation_end(run, evaluation(10, 1.0))
    assert capsys.readouterr().out == (
        "samples    1 now     text 2 for ask\n           2 now     text 2 for why\n"
    )
    run.step = 20
    samples.on_evaluation_end(run, evaluation(20, 1.0))
    samples.on_train_end(run, None)
    assert run.model.calls == 3, "at the last step it writes once"
    assert capsys.readouterr().out.endswith(
        "samples    step 20\n"
        "           1 prompt  ask↵\n"
        "             answer  say\n"
        "             before  text 1 for ask\n"
        "             now     text 3 for ask\n"
        "           2 prompt  why↵\n"
        "             answer  so\n"
        "             before  text 1 for why\n"
        "             now     text 3 for why\n"
    )


def test_a_resumed_run_remembers_what_was_written_before_the_first_step(run, capsys):
    first = Samples(SamplesConfig(num_prompts=1))
    first.on_train_start(run, None)
    run.step, run.steps_this_process = 20, 10
    second = Samples(SamplesConfig(num_prompts=1))
    second.load_state_dict(first.state_dict())
    capsys.readouterr()
    second.on_train_start(run, None)
    assert capsys.readouterr().out == ""
    second.on_train_end(run, None)
    assert "before  text 1 for ask\n             now     text 2" in capsys.readouterr().out


def test_a_run_that_is_told_to_leave_writes_nothing_more(run, capsys):
    samples = Samples(SamplesConfig(num_prompts=1))
    samples.on_train_start(run, None)
    capsys.readouterr()
    run.step = run.steps_this_process = 10
    run.stop("SIGTERM")
    samples.on_train_end(run, None)
    assert capsys.readouterr().out == ""


def test_own_prompts_are_put_into_the_chat_template(run, capsys):
    class Chats:
        chat_template = "a template"

        def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
            assert messages == [{"role": "user", "content": "hello"}]
            assert add_generation_prompt and not tokenize
            return "<user>hello<answer>"

    run.tokenizer = Chats()
    samples = Samples(SamplesConfig(prompts=("hello",)))
    samples.on_data_ready(run, report(eval_documents=0))
    samples.on_train_start(run, None)
    assert "1 prompt  <user>hello<answer>" in capsys.readouterr().out


def test_random_states_modes_and_gradients_are_as_before(run):
    run.model.train()
    run.model.norm.eval()  # frozen by a user, and to stay so
    draws = []
    for sample in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if sample:
            Samples().on_train_start(run, None)
        draws.append((random.random(), np.random.rand(), torch.rand(4).tolist()))
    assert draws[0] == draws[1]
    assert run.model.training and not run.model.norm.training and run.model.head.training
    assert torch.is_grad_enabled()


def test_without_prompts_or_held_out_data_it_is_refused(run):
    with pytest.raises(UserError, match="samples: there are no held-out data"):
        Samples().on_data_ready(run, report(eval_documents=0))
