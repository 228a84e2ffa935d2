"""Every setting of every stage: frozen dataclasses (`config.files` reads them from YAML).

One file describes one pipeline; each stage reads its own section. An unknown key, a wrong type or
an impossible value is a `UsageError` before anything is computed. All classes are hashable, so they
can be static arguments of jitted functions.
"""

from zip_rc_jax.config.checks import check_types
from zip_rc_jax.config.decode import ANSWERS, DecodeConfig, SamplingConfig
from zip_rc_jax.config.grade import GradeConfig, JudgeConfig
from zip_rc_jax.config.model import LAYER_TYPES, ModelConfig, RopeScaling
from zip_rc_jax.config.pipeline import (
    EvaluateConfig,
    GridConfig,
    LabelConfig,
    PipelineConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    SelfEvaluationConfig,
    to_dict,
)
from zip_rc_jax.config.problems import ProblemsConfig, SourceConfig
from zip_rc_jax.config.replay import ReplayConfig
from zip_rc_jax.config.reward_model import RewardModelConfig
from zip_rc_jax.config.train import (
    COMPUTE_DTYPES,
    KL_KINDS,
    LABELS,
    LENGTH_COUNTS,
    TRAIN_STAGES,
    MeshConfig,
    TrainConfig,
)

__all__ = [
    "ANSWERS",
    "COMPUTE_DTYPES",
    "KL_KINDS",
    "LABELS",
    "LAYER_TYPES",
    "LENGTH_COUNTS",
    "TRAIN_STAGES",
    "DecodeConfig",
    "EvaluateConfig",
    "GradeConfig",
    "GridConfig",
    "JudgeConfig",
    "LabelConfig",
    "MeshConfig",
    "ModelConfig",
    "PipelineConfig",
    "PolicyConfig",
    "ProblemsConfig",
    "PromptConfig",
    "ReplayConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RopeScaling",
    "SamplingConfig",
    "SelfEvaluationConfig",
    "SourceConfig",
    "TrainConfig",
    "check_types",
    "to_dict",
]
