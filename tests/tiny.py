"""A config that trains a tiny model from random weights in a second."""

CONFIG = {
    "model": {
        "type": "random",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
        },
    },
    "tokenizer": {"type": "trained", "vocab_size": 320},
    "data": {"sources": ["chats.jsonl"], "max_length": 64, "cache_dir": "cache"},
    "engine": {"device": "cpu"},
    "optimizer": {"learning_rate": 1e-2},
    "max_steps": 3,
    "logging": {"every_steps": 1},
    "checkpoint": [{"type": "huggingface"}],
}
