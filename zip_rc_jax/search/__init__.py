"""The search of ZIP-RC: pure JAX, no model, no files."""
