"""newllm_jax: New-LLM, an attention-free context-vector language model, and CASCADE, stages for a frozen SmolLM2.

The public names are imported where they are first used, so that `import newllm_jax` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newllm_jax.config import NewLLMConfig, load_config
    from newllm_jax.errors import InputError, NumericalError
    from newllm_jax.newllm.experiment import NewLLMResult, train_newllm
    from newllm_jax.newllm.generate import Sampling, generate
    from newllm_jax.newllm.model import ContextVectorLM
    from newllm_jax.newllm.run import NewLLMRun
    from newllm_jax.newllm.wikitext import WordTokenizer, load_wikitext
    from newllm_jax.runs import restore

__version__ = "0.1.0"

_HOMES = {
    "ContextVectorLM": "newllm.model",
    "InputError": "errors",
    "NewLLMConfig": "config",
    "NewLLMResult": "newllm.experiment",
    "NewLLMRun": "newllm.run",
    "NumericalError": "errors",
    "Sampling": "newllm.generate",
    "WordTokenizer": "newllm.wikitext",
    "generate": "newllm.generate",
    "load_config": "config",
    "load_wikitext": "newllm.wikitext",
    "restore": "runs",
    "train_newllm": "newllm.experiment",
}

__all__ = [
    "ContextVectorLM",
    "InputError",
    "NewLLMConfig",
    "NewLLMResult",
    "NewLLMRun",
    "NumericalError",
    "Sampling",
    "WordTokenizer",
    "generate",
    "load_config",
    "load_wikitext",
    "restore",
    "train_newllm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
