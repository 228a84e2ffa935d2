"""Training: `train_head` from records; the stages of a run call `trainer.train`.

Rollouts -> `data.batches` -> `TrainState` -> checkpoints, metrics and a `LanguageModel`:

api                      `train_head`: records in, a model out; a directory is optional
trainer                  the run: batches, steps, records, checkpoints, an exact resume
step                     one optimizer step, a pure jitted function of the state
loss                     the losses of the joint and of the policy, without a [B, S, V] array
features                 what a frozen body or teacher says about every token, computed once
checkpoint               the state on disk (Orbax)
tracking, event_file     metrics.jsonl, TensorBoard events, heat maps
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zip_rc_jax.training.api import train_head

__all__ = ["train_head"]


def __getattr__(name: str) -> Any:
    """Imported at first use: `training.loss` alone needs no trainer."""
    if name == "train_head":
        from zip_rc_jax.training.api import train_head

        return train_head
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
