"""Every mistake in a config is one line: file, line, key, what is wrong, what is expected."""

import pytest

from fasttrain.config.errors import UserError
from fasttrain.config.load import load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learing_rate: 1e-5\n",
            "learing_rate: unknown key. Did you mean 'optimizer.learning_rate'?",
        ),
        (
            "optimizer: {learing_rate: 1e-5}\n",
            "optimizer.learing_rate: unknown key. Did you mean 'learning_rate'?",
        ),
        (
            "optimizer: {warmup_ratio: 0.1}\n",
            "optimizer.warmup_ratio: unknown key. Did you mean 'scheduler.warmup_ratio'?",
        ),
        (
            "optimizer: {seed: 1}\n",
            "optimizer.seed: unknown key. Did you mean 'seed'?",
        ),
        (
            "optimizer: {type: sgd, eps: 0.1}\n",
            "optimizer.eps: unknown key. It belongs to adamw, bitsandbytes_adamw, muon, "
            "schedule_free_adamw, torchao_adamw.",
        ),
        ("every_steps: 3\n", "every_steps: unknown key. Did you mean 'eval.every_steps'?"),
        (
            "logging: {qqq: 1}\n",
            "logging.qqq: unknown key. There are: every_steps, level.",
        ),
        (
            "callbacks: [samples, {type: samples, num_promts: 1}]\n",
            "callbacks[1].num_promts: unknown key. Did you mean 'num_prompts'?",
        ),
        ("kernels: {rms_nrom: cpu}\n", "kernels.rms_nrom: unknown key. Did you mean 'rms_norm'?"),
        (
            "max_steps: ten\n",
            "max_steps: not a whole number (got 'ten', expected a whole number such as 100 or 8k).",
        ),
        (
            "max_steps: true\n",
            "max_steps: not a whole number (got true, expected a whole number such as 100 or 8k).",
        ),
        (
            "max_steps: 2.5\n",
            "max_steps: not a whole number (got 2.5, expected a whole number such as 100 or 8k).",
        ),
        ("max_steps: 0\n", "max_steps: out of range (got 0, expected at least 1)."),
        ("max_steps: -5\n", "max_steps: out of range (got -5, expected at least 1)."),
        (
            "max_steps: 3B\n",
            "max_steps: out of range (got '3B', expected at most 2147483647).",
        ),
        ("max_steps: 010\n", "max_steps: a number with a leading zero (got '010')."),
        (
            "max_steps: 12:30\n",
            "max_steps: not a whole number (got '12:30', expected a whole number such as 100 or "
            "8k).",
        ),
        (
            f"max_steps: {'9' * 5000}\n",
            f"max_steps: a number of more than 64 characters (got '{'9' * 58}…).",
        ),
        (f"max_steps: {'9' * 30}\n", f"max_steps: too large a number (got {'9' * 30})."),
        (
            "optimizer: {learning_rate: .nan}\n",
            "optimizer.learning_rate: not a finite number (got nan, expected a number such as "
            "2e-5).",
        ),
        (
            "optimizer: {learning_rate: 1e400}\n",
            "optimizer.learning_rate: not a finite number (got inf, expected a number such as "
            "2e-5).",
        ),
        (
            "optimizer: {learning_rate: 0}\n",
            "optimizer.learning_rate: out of range (got 0, expected more than 0).",
        ),
        (
            "optimizer: {betas: [0.9]}\n",
            "optimizer.betas[1]: missing.",
        ),
        (
            "optimizer: {betas: 0.9}\n",
            "optimizer.betas: not a list (got 0.9, expected a list).",
        ),
        (
            "data: {sources: [python_stdlib], packing: yes}\n",
            "data.packing: neither true nor false (got 'yes', expected true or false).",
        ),
        (
            "data: {sources: [python_stdlib], overlong: cut}\n",
            "data.overlong: unknown value "
            "(got 'cut', expected one of: split, truncate, drop, error).",
        ),
        (
            "data: {sources: []}\n",
            "data.sources: empty (got a list, expected at least 1).",
        ),
        (
            "data: {}\n",
            "data.sources: missing. It is needed: Paths, hub names or mappings with a "
            "`type`. A string that names an existing path is a file source; one that names a "
            "registered source is that source; else it is a dataset on the hub.",
        ),
        (
            "data: {sources: [{split: train}]}\n",
            "data.sources[0].type: the type is missing. There are: file, huggingface, "
            "python_stdlib.",
        ),
        (
            "data: {sources: [{path: a.jsonl, columns: {promt: q}}]}\n",
            "data.sources[0].columns.promt: unknown key. Did you mean 'prompt'?",
        ),
        (
            "data: {sources: [3]}\n",
            "data.sources[0]: not a mapping (got 3, expected `key: value` lines).",
        ),
        (
            "data: {sources: 3}\n",
            "data.sources: not a list (got 3, expected a list).",
        ),
        (
            "optimizer: [adamw]\n",
            "optimizer: not a mapping (got a list, expected `key: value` lines).",
        ),
        ("eval: 3\n", "eval: not a mapping (got 3, expected `key: value` lines)."),
        (
            "scheduler: cosin\n",
            "scheduler.type: unknown scheduler type (got 'cosin', expected one of: constant, "
            "cosine, linear, wsd). Did you mean 'cosine'?",
        ),
        (
            "optimizer: {type: 3}\n",
            "optimizer.type: no type (got 3). There are: adafactor, adamw, bitsandbytes_adamw, "
            "lion, muon, schedule_free_adamw, sgd, torchao_adamw.",
        ),
        (
            "type: ppo\n",
            "type: unknown trainer type (got 'ppo', expected one of: causal, sft).",
        ),
        (
            "type: causal\ntrainer: {type: sft}\n",
            "trainer.type: another method than the top-level `type` (got 'sft', expected "
            "'causal'). Set `type` alone.",
        ),
        (
            "callbacks: [tensor_board]\n",
            "callbacks[0].type: unknown callback type (got 'tensor_board', expected one of: "
            "canary, console, early_stopping, kernel_selection, loss_plot, metrics_file, "
            "nonfinite_guard, samples, tensorboard, unigram_baseline). Did you mean 'tensorboard'?",
        ),
        ("callbacks: 3\n", "callbacks: not a list (got 3, expected a list)."),
        (
            "output_dir: 3\n",
            "output_dir: not text (got 3, expected text; quote a number or a bool that is meant as "
            "text).",
        ),
        (
            "micro_batch_size:\n",
            "micro_batch_size: not a whole number (got nothing, expected a "
            "whole number such as 100 or 8k).",
        ),
    ],
)
def test_one_mistake_is_one_line(problems_of, text, message):
    base = "model: {type: random}\ntokenizer: trained\n"
    if not text.startswith("data:"):
        text = f"data: [python_stdlib]\n{text}"
    (problem,) = problems_of(text, base=base)
    place, _, rest = problem.partition(": ")
    assert rest == message
    assert place.startswith("sft.yaml:")


def test_what_is_missing_altogether(problems_of):
    assert problems_of("", base="seed: 1\n") == [
        "sft.yaml: model: missing. It is needed: The model, and what is done to it.",
        "sft.yaml: data: missing. It is needed: What the run learns from.",
    ]


def test_all_problems_come_at_once_in_file_order(problems_of, write):
    write("broken.jsonl", "{\n")
    lines = problems_of(
        "seed: one\n"
        "model:\n"
        "  type: random\n"
        "  architektur: llama\n"
        "data:\n"
        "  sources:\n"
        "    - broken.jsonl\n"
        "    - absent.jsonl\n"
        "  max_length: 0\n"
        "optimizer: {type: adam}\n"
        "scheduler: {warmup_steps: 1, warmup_ratio: 0.1}\n"
        "global_batch_size: 7\n"
        "micro_batch_size: 2\n"
        "seed: 2\n",
        ["callbacks=[sample]", "epochs=-1"],
        base="",
    )
    assert [": ".join(line.split(": ")[:2]) for line in lines] == [
        "sft.yaml:1: seed",
        "sft.yaml:4: model.architektur",
        "sft.yaml:8: data.sources[1].path",
        "sft.yaml:9: data.max_length",
        "sft.yaml:10: optimizer.type",
        "sft.yaml:11: scheduler.warmup_steps",
        "sft.yaml:12: global_batch_size",
        "sft.yaml:14: seed",
        "command line: callbacks[0].type",
        "command line: epochs",
        "broken.jsonl:1: invalid JSON at column 2 (Expecting property name enclosed in double "
        "quotes). Every row stands on one line.",
    ]


def test_a_mapping_has_no_place_but_every_key(workspace):
    with pytest.raises(UserError) as caught:
        load({"model": {"type": "random", "confg": {}}, "tokenizer": "trained", "data": "org/x"})
    assert str(caught.value) == "model.confg: unknown key. Did you mean 'config'?"


def test_a_long_value_is_cut_short(problems_of):
    (line,) = problems_of(f"seed: {'x' * 500}\n")
    assert len(line) < 160


def test_a_template_over_several_lines_stays_one_line(problems_of):
    (line,) = problems_of('precision: "a\\nb"\n')
    assert line == (
        "sft.yaml:4: precision: unknown value (got 'a\\nb', expected one of: auto, fp32, "
        "bf16-mixed, bf16)."
    )
