"""Every setting of every stage: frozen dataclasses (`config.files` reads them from YAML).

One file describes one pipeline; each stage reads its own section. An unknown key, a wrong type or
an impossible value is a `UsageError` before anything is computed. All classes are hashable, so they
can be static arguments of jitted functions.
"""

from zip_rc_jax.config.checks import check_types
from zip_rc_jax.config.decode import ANSWERS, DecodeConfig, SamplingConfig
from zip_rc_jax.config.model import LAYER_TYPES, ModelConfig, RopeScaling
from zip_rc_jax.config.pipeline import (
    MAX_SAMPLES,
    EvaluateConfig,
    GradeConfig,
    GridConfig,
    LabelConfig,
    PipelineConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    SelfEvaluationConfig,
    TaskConfig,
    to_dict,
)
from zip_rc_jax.config.replay import ReplayConfig
from zip_rc_jax.config.train import (
    COMPUTE_DTYPES,
    KL_KINDS,
    LABELS,
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
    "MAX_SAMPLES",
    "TRAIN_STAGES",
    "DecodeConfig",
    "EvaluateConfig",
    "GradeConfig",
    "GridConfig",
    "LabelConfig",
    "MeshConfig",
    "ModelConfig",
    "PipelineConfig",
    "PolicyConfig",
    "PromptConfig",
    "ReplayConfig",
    "RolloutConfig",
    "RopeScaling",
    "SamplingConfig",
    "SelfEvaluationConfig",
    "TaskConfig",
    "TrainConfig",
    "check_types",
    "to_dict",
]
