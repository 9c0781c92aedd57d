"""Configs written into an empty working directory, and what `load` says to them."""

from pathlib import Path

import pytest

from fasttrain.config.errors import UserError
from fasttrain.config.load import load

MINIMAL = """\
model: {type: random}
tokenizer: trained
data: {sources: [python_stdlib], eval_split: 5%}
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(workspace):
    def write_file(name, content):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write_file


@pytest.fixture
def config_of(write):
    """The loaded config of a text that stands below a minimal config."""

    def loaded(text="", overrides=(), base=MINIMAL, **options):
        return load(write("sft.yaml", base + text), overrides, **options)

    return loaded


@pytest.fixture
def problems_of(write):
    """What is wrong with a text, as the lines that the user sees."""

    def lines(text="", overrides=(), base=MINIMAL, **options):
        content = text if isinstance(text, bytes) else base + text
        with pytest.raises(UserError) as caught:
            load(write("sft.yaml", content), overrides, **options)
        return str(caught.value).split("\n")

    return lines
