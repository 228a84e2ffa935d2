"""How an external reward model judges samples."""

from __future__ import annotations

import dataclasses
from typing import Any

from zip_rc_jax.config.checks import check_types, counts, one_of, require, shown
from zip_rc_jax.config.train import COMPUTE_DTYPES


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """The baseline that weights votes with the scores of another model.

    Attributes:
      path: a Hugging Face sequence-classification model, as a directory or a hub name such as
        "Skywork/Skywork-Reward-V2-Qwen3-0.6B"; empty leaves the baseline out.
      chat_template_kwargs: variables of the reward model's own chat template.
      system: what its system turn says, in place of the policy's. Empty leaves that turn out, for
        templates that know none; a template may then write a default of its own. None keeps the
        policy's.
      batch_tokens: most tokens of one forward, padding included. A longer sample is a batch alone.
      dtype: "float32" or "bfloat16", of the reward model's parameters in memory.
    """

    path: str = ""
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str | None = None
    batch_tokens: int = 16384
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_types(RewardModelConfig, vars(self))
        where = "evaluate.reward_model"
        counts(f"{where}.batch_tokens", self.batch_tokens)
        one_of(f"{where}.dtype", self.dtype, COMPUTE_DTYPES)
        # A setting that nothing reads is a mistake, and it is not ignored.
        if not self.path:
            for name, default in (("chat_template_kwargs", {}), ("system", None)):
                require(
                    getattr(self, name) == default,
                    f"{where}.{name}={shown(getattr(self, name))} without a path",
                    "nothing would read it",
                    f"name the reward model in {where}.path, or leave it out",
                )
