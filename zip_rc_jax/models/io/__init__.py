"""Checkpoints and tokenizers of others and of our own, in and out.

load                             from a path or name to a `LanguageModel`; `export` back
huggingface, gguf, stored        the three formats: names and arrays, tensor by tensor
families                         config.json of each family <-> `ModelConfig` and parameter names
weights, digests                 tensors <-> parameters on the devices; whether a bit has flipped
tokenizer                        text <-> ids, chats, and the ids that no text gives
tokenizer_files, gguf_tokenizer  which file says what about a tokenizer
chat, generation                 chat templates within limits; generation_config.json
"""
