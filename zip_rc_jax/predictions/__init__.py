"""Reading the head off any text: what it predicts after every token, without any decoding.

api       `predict`, the public function: items in, `TokenPredictions` out
items     from texts, chats, ids and pairs to checked token ids
forward   hidden states and joints of whole sequences, in batches over all devices. Training,
          labelling and evaluation read rollouts through the same compiled programs.
"""

from zip_rc_jax.predictions.api import (
    BATCH_TOKENS,
    TokenPredictions,
    logit_chunks,
    predict,
    tokenize_items,
)
from zip_rc_jax.predictions.forward import (
    HiddenBatch,
    ScoringConfig,
    hidden_batches,
    joints_of,
    padded_width,
)
from zip_rc_jax.predictions.items import Item, TokenizedItem

__all__ = [
    "BATCH_TOKENS",
    "HiddenBatch",
    "Item",
    "ScoringConfig",
    "TokenPredictions",
    "TokenizedItem",
    "hidden_batches",
    "joints_of",
    "logit_chunks",
    "padded_width",
    "predict",
    "tokenize_items",
]
