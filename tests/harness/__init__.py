"""What several tests share: scripted models, slow references, tiny checkpoints, processes."""
