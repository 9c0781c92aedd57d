"""A model with a table of positions ends where the table ends, and that is said before training."""

import pytest
from model import tiny_models
from tiny import CONFIG

import fasttrain
from fasttrain.config.errors import UserError


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_table_of_positions_is_found(name):
    model = tiny_models.language_model(name)
    assert model.longest_document == model.causal_lm.config.max_position_embeddings


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_computed_positions_have_no_end(name):
    assert tiny_models.language_model(name).longest_document is None


def test_documents_beyond_the_table_are_refused(tmp_path):
    (tmp_path / "long.txt").write_text("one two three four " * 40)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = {
        **CONFIG,
        "model": {"type": "random", "architecture": "gpt2", "config": sizes},
        "data": {"sources": [str(tmp_path / "long.txt")], "max_length": 64},
        "output_dir": str(tmp_path / "run"),
    }
    config["data"]["cache_dir"] = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.max_length: .* positions for 16\. Set .*=16"):
        fasttrain.run(config)
