"""The pages say what is so: links, commands, keys and messages exist, and the samples run."""

import ast
import json
import re
import shlex

import pytest
import typer
import yaml
from documents import DOCS, PAGES, ROOT, blocks, commands, name_of, own_code, prose
from tiny import CONFIG

import fasttrain
from fasttrain.cli.app import app
from fasttrain.config.json_schema import config_schema
from fasttrain.config.load import load
from fasttrain.config.registry import REGISTRIES
from fasttrain.config.tree import Origin, plain
from fasttrain.config.yaml_reader import parse
from fasttrain.core.events import WRAPPABLE, Callback
from fasttrain.core.run import Run

DOC = ROOT / "docs"
SAMPLES = [pair for page in DOCS for pair in own_code(page)]
FRAGMENTS = [block for page in DOCS for block in blocks(page, "yaml")]
BASE = {"model": {"name_or_path": "org/model"}, "data": {"sources": ["my.jsonl"]}}


def read(block):
    """A block of YAML as fasttrain reads it."""
    return plain(parse(block.text, lambda line, column: Origin("file"), []))


def config_of(fragment):
    """A whole config: the fragment, and what it leaves out."""
    if "extends" in fragment:
        return fragment
    model = fragment.get("model", {})
    if isinstance(model, dict) and "type" not in model:
        model = {**BASE["model"], **model}
    return {**BASE, **fragment, "model": model}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A directory that has every file the pages speak of, and a run's config, `sft.yaml`."""
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ok"}]}
        for i in range(40)
    ]
    for name in ("chats.jsonl", "my.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in chats))
    for directory in ("texts", "runs/lora/model", "path/to/model"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "texts/a.txt").write_text("To be, or not to be.\n\nThat is the question.\n" * 20)
    (tmp_path / "runs/lora/model/adapter_config.json").write_text("{}")
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- links ---------------------------------------------------------------------------------------


def anchors(page):
    """What the site makes of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", text) for text in words}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(linked), f"{target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_exist(page):
    roots = "fasttrain|configs|kernels|csrc|bench|docs|tests"
    for file in re.findall(rf"`((?:{roots})/[\w./-]+\.\w+)`", prose(page)):
        assert (ROOT / file).exists() or (page.parent / file).exists(), f"{file} is not there"


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(file for entry in nav for file in entry.values()) == [p.name for p in DOCS]


# --- commands ------------------------------------------------------------------------------------


def click_command(words):
    """The command that `fasttrain …` means, and the words behind its name."""
    command = typer.main.get_command(app)
    rest = words[1:]
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no verb {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        words = [
            word for word in shlex.split(line, comments=True) if word not in ("[KEY=VALUE", "…]")
        ]
        if words[0] == "make":
            for target in words[1:]:
                assert "=" in target or target in targets, f"{line}: no such target"
            continue
        command, rest = click_command(words)
        options = {name for option in command.params for name in option.opts}
        for word in rest:
            assert not word.startswith("--") or word in {*options, "--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_values_on_command_lines_are_known(page, workspace):
    for name in ("runs/sft", "runs/sft/checkpoints/step-00000400"):
        (workspace / name).mkdir(parents=True)
    for name, text in (("config.json", "{}"), ("model.safetensors", "")):
        (workspace / "path/to/model" / name).write_text(text)
    for line in commands(page):
        words = shlex.split(line, comments=True)
        values = [word for word in words[3:] if re.match(r"[a-z_][\w.]*=", word)]
        if words[:2] == ["fasttrain", "run"] and words[2] != "FILE" and values:
            file = ROOT / words[2] if words[2].startswith("configs/") else "sft.yaml"
            load(str(file), [value.replace("=/path/", "=path/") for value in values])


# --- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", FRAGMENTS, ids=lambda block: block.name)
def test_yaml_is_accepted(block, workspace):
    code = next((code for code, config in SAMPLES if config == block), None)
    (workspace / "my_code.py").write_text(code.text if code else "")
    load(config_of(read(block)))


def schema_keys():
    """Every key path of the config, with the entries of lists under the list's own."""
    schema = config_schema()
    keys = {}

    def add(section, prefix):
        for name, field in section.get("properties", {}).items():
            keys.setdefault(f"{prefix}{name}", field)

    add(schema, "")
    for name, section in schema["$defs"].items():
        kind = name.partition(".")[0]
        add(
            section,
            {"transform": "model.transforms.", "source": "data.sources."}.get(kind, f"{kind}."),
        )
    for name, prefix in (("EvalConfig", "eval."), ("LoggingConfig", "logging.")):
        add(schema["$defs"][name], prefix)
    add(schema["$defs"]["KernelsConfig"], "kernels.")
    return keys


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_keys_named_in_prose_exist(page):
    keys = schema_keys()
    sections = {key.partition(".")[0] for key in keys if "." in key}
    text = prose(page).partition("## Names of other trainers")[0]
    for name in re.findall(r"`([a-z_]+\.[a-z_]+)(?:[=:][^`]*)?`", text):
        if name.partition(".")[0] in sections and not name.endswith((".py", ".json", ".md")):
            assert name in keys, name


@pytest.mark.parametrize(
    ("page", "kinds"),
    [
        ("callbacks.md", ["callback"]),
        ("checkpoint.md", ["checkpoint"]),
        ("data.md", ["source"]),
        ("model.md", ["model", "transform"]),
        ("optimizer.md", ["optimizer"]),
        ("scheduler.md", ["scheduler"]),
        ("tokenizer.md", ["tokenizer"]),
        ("trainer.md", ["trainer", "engine"]),
    ],
)
def test_every_component_is_on_its_page(page, kinds):
    text = (DOC / page).read_text()
    implied = {("engine", "auto"), ("model", "huggingface"), ("tokenizer", "huggingface")}
    for kind in kinds:
        for name in REGISTRIES[kind].names():
            assert (kind, name) in implied or re.search(rf"\b{name}\b", text), name


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "config"), SAMPLES, ids=lambda block: block.name)
def test_own_components_train_stop_and_go_on(code, config, workspace):
    values = read(config)
    values.setdefault("checkpoint", ["sharded", "huggingface"])
    samples = {"type": "samples", "prompts": ["1?"], "max_new_tokens": 2}
    values.setdefault("callbacks", [samples])
    (workspace / "my_code.py").write_text(code.text)
    (workspace / "own.yaml").write_text(yaml.safe_dump({"extends": "sft.yaml", **values}))
    first = fasttrain.run("own.yaml", ["max_steps=4", "stop_after=2"])
    second = fasttrain.run("own.yaml", ["max_steps=4"])
    assert (first.step, first.finished) == (2, False)
    assert (second.step, second.finished, second.exit_code) == (4, True, 0)
    assert second.directory == first.directory


def test_python_samples(workspace, capsys):
    names = {}
    for page in ("usage.md", "checkpoint.md"):
        samples = [b for b in blocks(DOC / page, "python") if not b.text.startswith("# my_code.py")]
        assert samples
        for sample in samples:
            exec(sample.text, names)
    assert names["result"].step == 100
    assert names["model"].config.hidden_size == 32
    assert str(names["result"].directory) in capsys.readouterr().out.splitlines()[-1]


# --- what the pages state ------------------------------------------------------------------------


def test_wrappers_get_the_arguments_that_the_page_shows(workspace):
    table = re.findall(r"`wrap_(\w+)` \| `call\((.*?)\)`", (DOC / "callbacks.md").read_text())
    shown = {name: len(arguments.split(", ")) if arguments else 0 for name, arguments in table}
    seen = {}

    def wrapper(name):
        def wrap(self, run, call, *args):
            seen[name] = len(args)
            return call(*args)

        return wrap

    every = {f"wrap_{name}": wrapper(name) for name in WRAPPABLE}
    fasttrain.run(
        "sft.yaml", ["data.eval_split=0.2"], callbacks=[type("Every", (Callback,), every)()]
    )
    assert seen == shown


def test_a_run_has_what_the_page_names():
    text = (DOC / "callbacks.md").read_text()
    known = {*Run.__dataclass_fields__, *vars(Run)}
    assert set(re.findall(r"\brun\.([a-z_]+)\b", text)) <= known


def test_the_factors_of_the_schedules():
    text = (DOC / "scheduler.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d\.\d\d.*) \|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == REGISTRIES["scheduler"].names()
    for name, factors in rows:
        options = {"decay_ratio": 0.25} if name == "wsd" else {}
        config = REGISTRIES["scheduler"].config(name)(warmup_steps=2, **options)
        schedule = REGISTRIES["scheduler"].component(name)(config)
        assert [f"{schedule.factor(step, 8):.2f}" for step in range(8)] == factors.split(" | ")


def texts_of_the_code():
    """Every text in the code, what is filled in left out."""
    found = []
    for package in ("fasttrain", "kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_are_those_of_the_code():
    texts = texts_of_the_code()
    for page in DOCS:
        table = page.read_text().partition("\n## Errors\n")[2]
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
            for message in re.findall(r"`([^`]+)`", row):
                parts = re.split(r"…|'[^']*'|\bN\b|\d+|\(|\)|→|[A-Z]\w+\.\w+|NoneType", message)
                longest = max(parts, key=len).strip(" .:,;")
                assert any(longest in text for text in texts), f"{page.name}: {longest!r}"
