"""What no single key can know: keys that exclude each other, files, models, directories."""

import json
import os
import stat
import struct

import pytest

ROW = '{"prompt": "a", "completion": "b"}\n'

# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "scheduler: {warmup_steps: 3, warmup_ratio: 0.2}\n",
            "scheduler.warmup_steps: excludes scheduler.warmup_ratio (got 3 and 0.2). Keep one.",
        ),
        (
            "scheduler: {warmup_steps: 100}\nmax_steps: 100\n",
            "scheduler.warmup_steps: warm-up would fill the run (got 100, expected less than "
            "max_steps = 100).",
        ),
        (
            "scheduler: {type: wsd, warmup_ratio: 0.5, decay_ratio: 0.6}\n",
            "scheduler.decay_ratio: warm-up and decay overlap (got 0.6 + 0.5 > 1).",
        ),
        (
            "global_batch_size: 10\nmicro_batch_size: 4\ngradient_accumulation_steps: 2\n",
            "global_batch_size: no multiple of micro_batch_size 4 × gradient_accumulation_steps 2 "
            "= 8 (got 10, 10 ÷ 8 leaves 2). Use 8 or 16.",
        ),
        (
            "global_batch_size: 10\nmicro_batch_size: 4\n",
            "global_batch_size: no multiple of micro_batch_size 4 (got 10, 10 ÷ 4 leaves 2). "
            "Use 8 or 12.",
        ),
        (
            "global_batch_size: 2\nmicro_batch_size: 4\n",
            "global_batch_size: no multiple of micro_batch_size 4 (got 2, 2 ÷ 4 leaves 2). "
            "Use 4, or a smaller micro_batch_size.",
        ),
        (
            "optimizer: {rules: [{match: '*', learning_rate: 1, learning_rate_scale: 0.5}]}\n",
            "optimizer.rules[0].learning_rate: excludes learning_rate_scale (got 1 and 0.5). "
            "Keep one.",
        ),
        (
            "optimizer: {rules: [{match: a.*, weight_decay: 0}, {match: [a.*, b.*]}]}\n",
            "optimizer.rules[1]: changes nothing. Set learning_rate, learning_rate_scale or "
            "weight_decay, or drop the rule.",
        ),
        (
            "optimizer: {gradient_release: true}\n",
            "optimizer.gradient_release: can't clip by the norm of all gradients (got "
            "max_grad_norm: 1). Set max_grad_norm: 0.",
        ),
        (
            "optimizer: {gradient_release: true}\nmax_grad_norm: 0\nglobal_batch_size: 4\n",
            "optimizer.gradient_release: can't add up gradients over the micro-batches of a step. "
            "Drop gradient_accumulation_steps, and global_batch_size where it is larger than "
            "micro_batch_size.",
        ),
        (
            "optimizer: {rules: [{match: [], weight_decay: 0}]}\n",
            "optimizer.rules[0].match: no globs (got an empty list). Name parameters, such as "
            "`model.layers.0.*`.",
        ),
        (
            "callbacks: [samples, samples]\n",
            "callbacks[1]: 'samples' is given twice (first as callbacks[0]). Keep one.",
        ),
        (
            "checkpoint: [sharded, huggingface, sharded]\n",
            "checkpoint[2]: 'sharded' is given twice (first as checkpoint[0]). Keep one.",
        ),
        (
            "kill_file: nowhere/STOP\n",
            "kill_file: there is no directory 'nowhere' (got 'nowhere/STOP'). "
            "Make it, or leave kill_file out.",
        ),
        (
            "resume: runs/nothing\n",
            "resume: no such checkpoint (got 'runs/nothing', expected auto, never or a directory). "
            "There is no directory 'runs' either.",
        ),
    ],
)
def test_keys_that_do_not_go_together(problems_of, text, message):
    assert [line.partition(": ")[2] for line in problems_of(text)] == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval: {every_steps: 5}", "eval.every_steps: there are no held-out data to evaluate."),
        ("eval: {at_start: true}", "eval.at_start: there are no held-out data to evaluate."),
        ("eval: {max_batches: 3}", "eval.max_batches: there are no held-out data to evaluate."),
        (
            "callbacks: [console, early_stopping]",
            "callbacks[1]: 'early_stopping' needs held-out data, and there are none.",
        ),
        (
            "callbacks: [samples]",
            "callbacks[0]: 'samples' needs held-out data, and there are none.",
        ),
    ],
)
def test_what_evaluates_needs_held_out_data(problems_of, config_of, text, message):
    base = "model: {type: random}\ntokenizer: trained\ndata: [python_stdlib]\n"
    hint = "Set data.eval_split=5%, or name data.eval_sources."
    assert problems_of(text, base=base) == [f"sft.yaml:4: {message} {hint}"]
    config_of(text, ["data.eval_split=5%"], base=base)
    config_of("callbacks: [{type: samples, prompts: [hello]}]", base=base)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "eval_split: 0.1, eval_sources: [org/held-out]",
            "data.eval_split: excludes data.eval_sources (got 0.1). Keep one.",
        ),
        (
            "eval_split: 100%",
            "data.eval_split: leaves nothing to train on (got 1, expected a share such as 5%).",
        ),
        (
            "max_length: 4",
            "data.max_length: too small (got 4, expected at least 8 tokens).",
        ),
    ],
)
def test_data_keys_that_do_not_go_together(problems_of, data, message):
    base = f"model: {{type: random}}\ntokenizer: trained\ndata: {{sources: [org/x], {data}}}\n"
    assert problems_of(base=base) == [f"sft.yaml:3: {message}"]


def test_transforms_stand_in_one_order(problems_of, config_of):
    reason = (
        "Adapters change which modules there are, checkpointing wraps the layers, and what is "
        "compiled is the result."
    )
    key = "command line: model.transforms"
    assert problems_of("", ["model.transforms=[activation_checkpoint, lora]"]) == [
        f"{key}[1]: 'lora' stands after 'activation_checkpoint' (expected before it). {reason}"
    ]
    assert problems_of("", ["model.transforms=[kernels]"]) == [
        f"{key}[0]: 'kernels' is always there and not listed. "
        "Remove it; its options are the top-level `kernels`."
    ]
    config_of("", ["model.transforms=[lora, activation_checkpoint, compile]"])


def test_an_optimizer_of_another_package_needs_it(problems_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problems_of("optimizer: bitsandbytes_adamw\n") == [
        "sft.yaml:4: optimizer.type: 'bitsandbytes_adamw' needs the package bitsandbytes, "
        "which is not installed. pip install bitsandbytes, or take another optimizer."
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("optimizer: torchao_adamw\n", "it is in tensors of classes of torchao's own."),
        ("optimizer: {type: bitsandbytes_adamw, paged: true}\n", "with `paged` it is in pages"),
    ],
)
def test_state_that_cannot_be_put_back_is_not_saved(
    problems_of, config_of, monkeypatch, text, reason
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (problem,) = problems_of(f"{text}checkpoint: [huggingface, sharded]\n")
    assert problem.startswith("sft.yaml:5: checkpoint[1]: 'sharded' can't keep the state of '")
    assert reason in problem
    assert config_of(f"{text}checkpoint: [huggingface]\n").notes == ()


def test_a_model_from_scratch_needs_a_tokenizer(problems_of):
    base = "model: {type: random}\ndata: [python_stdlib]\n"
    assert problems_of(base=base) == [
        "sft.yaml: tokenizer: a model with random weights has no tokenizer of its own. Set "
        "tokenizer.name_or_path, or tokenizer.type=trained to train one on the data."
    ]


def test_what_is_legal_and_worth_saying(config_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert config_of("optimizer: schedule_free_adamw\n").notes == (
        "schedule_free_adamw is made for scheduler.type=constant, and it is cosine",
    )
    assert config_of("optimizer: schedule_free_adamw\nscheduler: constant\n").notes == ()
    assert config_of("epochs: 2\nmax_steps: 100\n").notes == (
        "epochs 2 and max_steps 100 are both given: whichever ends first",
    )
    base = "model: {name_or_path: org/x, trust_remote_code: true}\ndata: [org/y]\n"
    assert config_of(base=base).notes == (
        "Python code that comes with the model is run: model.trust_remote_code",
    )


# --- models --------------------------------------------------------------------------------------


@pytest.fixture
def model_problems(problems_of):
    return lambda text="m": problems_of(base=f"model: {text}\ndata: [org/x]\n")


def test_a_model_directory_that_cannot_be_loaded(model_problems, write, workspace):
    assert model_problems("./mm") == [
        "sft.yaml:1: model.name_or_path: no such directory (got './mm')."
    ]
    write("m/weights.txt", "x")
    assert model_problems() == [
        "sft.yaml:1: model.name_or_path: the directory holds no config.json (got 'm')."
    ]
    write("m/config.json", "{")
    (problem,) = [line for line in model_problems() if line.startswith("m/config.json")]
    assert problem.startswith("m/config.json: cannot be read (Expecting property name")
    write("m/config.json", "{}")
    assert model_problems() == [
        "sft.yaml:1: model.name_or_path: the directory holds no .safetensors weights (got 'm')."
    ]
    write("m/pytorch_model.bin", "x")
    assert model_problems() == [
        "sft.yaml:1: model.name_or_path: the weights are pickles, which are never loaded (got "
        "'pytorch_model.bin'). Save them as safetensors: model.save_pretrained(DIR) in "
        "transformers."
    ]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write("m/model.safetensors.index.json", json.dumps(index))
    write("m/model-1.safetensors", struct.pack("<Q", 2) + b"{}")
    assert model_problems() == [
        "sft.yaml:1: model.name_or_path: 1 weight file(s) of the index are missing: "
        "model-2.safetensors (got 'm')."
    ]
    write("file", "x")
    assert model_problems("./file") == [
        "sft.yaml:1: model.name_or_path: a file (got './file', expected the model's directory)."
    ]


def test_a_model_that_brings_code_is_asked_for(model_problems, write, config_of):
    write("m/config.json", '{"auto_map": {"AutoModel": "modeling.Model"}}')
    write("m/model.safetensors", "x")
    assert model_problems() == [
        "sft.yaml:1: model.trust_remote_code: the model brings Python code of its own ('auto_map' "
        "in 'm/config.json'). Read that code; then set model.trust_remote_code=true."
    ]
    base = "model: {name_or_path: m, trust_remote_code: true}\ndata: [org/x]\n"
    assert config_of(base=base).config.model.trust_remote_code


def test_paths_of_tokenizer_template_and_adapters(problems_of, write):
    write("template.jinja", "x")
    base = (
        "model: {name_or_path: org/x, transforms: [{type: lora, adapter_path: adapter}]}\n"
        "tokenizer: {name_or_path: ./tok, chat_template: templat.jinja}\ndata: [org/x]\n"
    )
    assert problems_of(base=base) == [
        "sft.yaml:1: model.transforms[0].adapter_path: no adapters are there (got 'adapter', "
        "expected a directory with adapter_config.json).",
        "sft.yaml:2: tokenizer.chat_template: no such file (got 'templat.jinja'). "
        "Did you mean 'template.jinja'?",
        "sft.yaml:2: tokenizer.name_or_path: no such directory (got './tok').",
    ]


# --- the run directory ---------------------------------------------------------------------------


def test_output_directories_that_cannot_serve(problems_of, write, workspace):
    write("train/a.jsonl", ROW)
    write("file", "x")
    base = "model: {type: random}\ntokenizer: trained\ndata: [%s]\noutput_dir: %s\n"
    for source, written, message in [
        ("train", "/", "the root directory (got '/')."),
        ("train", "file", "a file is in the way (got 'file')."),
        (
            "train",
            "file/run",
            f"cannot be written: '{workspace}/file' is a file (got 'file/run'). "
            "Give another output_dir.",
        ),
        (
            "train",
            "train",
            f"the directory that the run reads (got 'train', which meets '{workspace}/train'). "
            "Give another output_dir.",
        ),
        (
            "train/a.jsonl",
            "./train",
            f"the directory that the run reads (got './train', which meets '{workspace}/train'). "
            "Give another output_dir.",
        ),
        (
            "train",
            "train/runs/a",
            f"inside a directory that the run reads (got 'train/runs/a', which meets "
            f"'{workspace}/train'). Give another output_dir.",
        ),
        (
            "'train/**/*.jsonl'",
            "train/run",
            f"inside a directory that the run reads (got 'train/run', which meets "
            f"'{workspace}/train'). Give another output_dir.",
        ),
        ("train", '"a\\nb"', "not a path (got 'a\\nb')."),
    ]:
        assert problems_of(base=base % (source, written)) == [f"sft.yaml:4: output_dir: {message}"]


def test_a_run_may_lie_beside_its_data(write, config_of):
    write("train.jsonl", ROW)
    base = "model: {type: random}\ntokenizer: trained\ndata: [train.jsonl]\n"
    assert config_of("output_dir: runs/a\n", base=base).config.output_dir == "runs/a"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output_directory(problems_of, workspace):
    (workspace / "locked").mkdir()
    (workspace / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert problems_of("output_dir: locked/run\n") == [
        "sft.yaml:4: output_dir: cannot be written: no permission to write in "
        f"'{workspace}/locked' (got 'locked/run'). Give another output_dir."
    ]


def test_an_unwritable_output_directory_for_any_user(problems_of, workspace, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert problems_of() == [
        f"sft.yaml: output_dir: cannot be written: no permission to write in '{workspace}' "
        "(got 'runs/sft'). Give another output_dir."
    ]


def test_loading_writes_nothing(config_of, workspace):
    config_of("output_dir: runs/a\n")
    assert sorted(path.name for path in workspace.iterdir()) == ["sft.yaml"]
