"""Every setting, once, typed and checked: a file a system; configurations from TOML, JSON and `--field value`."""

from newllm_jax.config.base import AskedPrecision, Config, Examples, Precision, RunConfig, check_fields, setting
from newllm_jax.config.cascade import CascadeConfig, Criterion
from newllm_jax.config.checking import check, check_seed, checked, checked_path, expanded
from newllm_jax.config.chunks import ChunkConfig
from newllm_jax.config.finetune import FinetuneConfig
from newllm_jax.config.load import config_names, load_config
from newllm_jax.config.newllm import LARGEST_VOCABULARY, Cell, Initialization, NewLLMConfig
from newllm_jax.config.parsing import nearest, parse

__all__ = [
    "LARGEST_VOCABULARY",
    "AskedPrecision",
    "CascadeConfig",
    "Cell",
    "ChunkConfig",
    "Config",
    "Criterion",
    "Examples",
    "FinetuneConfig",
    "Initialization",
    "NewLLMConfig",
    "Precision",
    "RunConfig",
    "check",
    "check_fields",
    "check_seed",
    "checked",
    "checked_path",
    "config_names",
    "expanded",
    "load_config",
    "nearest",
    "parse",
    "setting",
]
