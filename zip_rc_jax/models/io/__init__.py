"""Other people's checkpoints and tokenizers, in and out."""
