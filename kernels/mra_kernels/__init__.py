"""Multi-resolution attention (MRA) operators: torch only, no transformers."""

from mra_kernels.api import Impl, MraResult, implementations, mra_attention, reason_against
from mra_kernels.config import PRESETS, MraAttentionConfig, MraKeysConfig
from mra_kernels.decode import KeyPyramid
from mra_kernels.exact import exact_attention, exact_with_lse
from mra_kernels.masks import AttentionMask
from mra_kernels.scores import ScoreRule

__all__ = [
    "PRESETS",
    "AttentionMask",
    "Impl",
    "KeyPyramid",
    "MraAttentionConfig",
    "MraKeysConfig",
    "MraResult",
    "ScoreRule",
    "exact_attention",
    "exact_with_lse",
    "implementations",
    "mra_attention",
    "reason_against",
]
