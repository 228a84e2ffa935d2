"""Problems, prompts, rollouts, and the batches that training reads."""
