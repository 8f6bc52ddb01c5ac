"""DeepSeek-LLM, DeepSeekMoE, DeepSeek-V2 and DeepSeek-V3 for transformers. Importing this registers the Auto classes."""

import transformers

from . import modeling_deepseek as _modeling
from .cache import LatentCache
from .configuration_deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .hub import AUTO_CLASSES as _AUTO_CLASSES
from .hub import PREFIXES as _PREFIXES
from .modeling_deepseek import *  # noqa: F403 (its __all__ is ours)

for _model_type, _prefix in _PREFIXES.items():
    _config = globals()[f"{_prefix}Config"]
    transformers.AutoConfig.register(_model_type, _config, exist_ok=True)
    for _auto, _suffix in _AUTO_CLASSES.items():
        getattr(transformers, _auto).register(_config, getattr(_modeling, _prefix + _suffix), exist_ok=True)

__all__ = ["DeepseekConfig", "DeepseekV2Config", "DeepseekV3Config", "LatentCache", *_modeling.__all__]
