"""Documents as padded rows, for models that can't run on the flat batch.

Each document becomes a row of its own, filled up on the right to the longest one; nothing after a
document's end can reach it in a causal model, recurrent ones included. The price is the padding:
D documents cost D × (length of the longest) tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fasttrain.core.batch import Batch


def hidden_states(body: nn.Module, batch: Batch) -> Tensor:
    """(T, H): the body's output at every token of the flat batch, in its order."""
    lengths = batch.layout.lengths
    output = body(
        input_ids=rows(batch.input_ids, lengths),
        attention_mask=rows(torch.ones_like(batch.input_ids), lengths),
        use_cache=False,
    )
    return flat(output[0], lengths)


def rows(tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(T,) -> (D, longest), filled up with zeros."""
    return pad_sequence(list(tokens.split(list(lengths))), batch_first=True)


def flat(padded: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(D, longest, H) -> (T, H): the inverse of `rows`."""
    return torch.cat([row[:length] for row, length in zip(padded.unbind(), lengths, strict=True)])
