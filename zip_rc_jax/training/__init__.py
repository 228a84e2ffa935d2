"""Training: `train_head` from records; the stages of a run call `trainer.train`."""

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
