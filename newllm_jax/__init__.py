"""newllm_jax: New-LLM, an attention-free context-vector language model, and CASCADE, stages for a frozen SmolLM2.

The public names are imported where they are first used, so that `import newllm_jax` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newllm_jax.cascade import hardness
    from newllm_jax.cascade.ensemble import evaluate_ensemble
    from newllm_jax.cascade.experiment import CascadeResult, train_cascade
    from newllm_jax.cascade.run import CascadeRun
    from newllm_jax.cascade.stage.model import Stage
    from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, load_config
    from newllm_jax.decoding.sampling import Sampling
    from newllm_jax.errors import InputError, NumericalError
    from newllm_jax.finetuning.experiment import FinetuneResult, finetune
    from newllm_jax.newllm.experiment import NewLLMResult, train_newllm
    from newllm_jax.newllm.model import ContextVectorLM
    from newllm_jax.newllm.run import NewLLMRun
    from newllm_jax.newllm.wikitext import WordTokenizer, load_wikitext
    from newllm_jax.smollm.alpaca import load_alpaca
    from newllm_jax.smollm.model import SmolLM2
    from newllm_jax.smollm.pretrained import load_smollm2
    from newllm_jax.systems import generate, restore

__version__ = "0.1.0"

_HOMES = {
    "CascadeConfig": "config",
    "CascadeResult": "cascade.experiment",
    "CascadeRun": "cascade.run",
    "ContextVectorLM": "newllm.model",
    "FinetuneConfig": "config",
    "FinetuneResult": "finetuning.experiment",
    "InputError": "errors",
    "NewLLMConfig": "config",
    "NewLLMResult": "newllm.experiment",
    "NewLLMRun": "newllm.run",
    "NumericalError": "errors",
    "Sampling": "decoding.sampling",
    "SmolLM2": "smollm.model",
    "Stage": "cascade.stage.model",
    "WordTokenizer": "newllm.wikitext",
    "evaluate_ensemble": "cascade.ensemble",
    "finetune": "finetuning.experiment",
    "generate": "systems",
    "hardness": "cascade.hardness",
    "load_alpaca": "smollm.alpaca",
    "load_config": "config",
    "load_smollm2": "smollm.pretrained",
    "load_wikitext": "newllm.wikitext",
    "restore": "systems",
    "train_cascade": "cascade.experiment",
    "train_newllm": "newllm.experiment",
}

__all__ = [
    "CascadeConfig",
    "CascadeResult",
    "CascadeRun",
    "ContextVectorLM",
    "FinetuneConfig",
    "FinetuneResult",
    "InputError",
    "NewLLMConfig",
    "NewLLMResult",
    "NewLLMRun",
    "NumericalError",
    "Sampling",
    "SmolLM2",
    "Stage",
    "WordTokenizer",
    "evaluate_ensemble",
    "finetune",
    "generate",
    "hardness",
    "load_alpaca",
    "load_config",
    "load_smollm2",
    "load_wikitext",
    "restore",
    "train_cascade",
    "train_newllm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(home, name, home)  # `hardness` is a module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
