"""Tiny random reward models in the files that transformers writes."""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification

from harness.hf_models import torch_model
from harness.small_tokenizers import chatml


def saved_reward_model(directory, name="qwen3", tokenizer=None, **changes):
    """The torch model, which is saved in `directory` beside a tokenizer with a chat template.

    Its settings are those of `hf_models.MODELS[name]` but for a vocabulary of the tokenizer's size,
    one label and a padding id.
    """
    tokenizer = tokenizer or chatml()
    pad = tokenizer.backend.token_to_id(tokenizer.special_tokens["pad_token"])
    settings = {"vocab_size": tokenizer.size, "num_labels": 1, "pad_token_id": pad} | changes
    model = torch_model(name, AutoModelForSequenceClassification, **settings)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model
