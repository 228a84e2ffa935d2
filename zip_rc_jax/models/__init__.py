"""The transformer of all families, its cache, and its files.

language_model   what is loaded, trained, decoded and saved: sizes, parameters, tokenizer, ZIP head
transformer      pure functions on plain parameters: `forward_packed` for whole sequences,
                 `forward_cached` for new tokens, `logits` of hidden states
stacks           which layers share one stacked array, so that a model is still a few scans
kv_cache         the decoding cache, an explicit pytree
paged_cache      its keys and values in pages, with a table for each row
attention        the ways to compute attention, for each platform
io               checkpoints and tokenizers of others and of our own, in and out
"""
