"""newllm_jax: New-LLM, an attention-free context-vector language model, and CASCADE, stages for a frozen SmolLM2.

Axes, in the shapes of all docstrings: B batch, T time, E embedding, H hidden, C context, V vocabulary, L layers.

The public names are imported where they are first used, so that `import newllm_jax` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # that of `typing`, which takes 10 ms to import: a command listens for signals before that
if TYPE_CHECKING:
    from typing import Any

    from newllm_jax.cascade import hardness
    from newllm_jax.cascade.ensemble import evaluate_ensemble
    from newllm_jax.cascade.experiment import train_cascade
    from newllm_jax.cascade.extraction import extract
    from newllm_jax.cascade.run import CascadeRun, DesignRun
    from newllm_jax.cascade.stage.model import Stage
    from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, load_config
    from newllm_jax.decoding.sampling import Sampling
    from newllm_jax.errors import InputError, NumericalError, Stopped
    from newllm_jax.finetuning.experiment import finetune
    from newllm_jax.finetuning.run import FinetuneRun
    from newllm_jax.generation import generate, generate_all
    from newllm_jax.newllm.experiment import train_newllm
    from newllm_jax.newllm.model import ContextVectorLM
    from newllm_jax.newllm.run import NewLLMRun
    from newllm_jax.newllm.tokenizer import WordTokenizer
    from newllm_jax.newllm.wikitext import load_wikitext
    from newllm_jax.records.results import RunResult
    from newllm_jax.records.results import RunResult as CascadeResult
    from newllm_jax.records.results import RunResult as FinetuneResult
    from newllm_jax.records.results import RunResult as NewLLMResult
    from newllm_jax.smollm.alpaca import load_alpaca
    from newllm_jax.smollm.model import SmolLM2
    from newllm_jax.smollm.pretrained import load_smollm2
    from newllm_jax.systems import export, restore

__version__ = "0.1.0"

_HOMES = {
    "CascadeConfig": "newllm_jax.config:CascadeConfig",
    "CascadeResult": "newllm_jax.records.results:RunResult",  # its name in version 0.1.0
    "CascadeRun": "newllm_jax.cascade.run:CascadeRun",
    "ContextVectorLM": "newllm_jax.newllm.model:ContextVectorLM",
    "DesignRun": "newllm_jax.cascade.run:DesignRun",
    "FinetuneConfig": "newllm_jax.config:FinetuneConfig",
    "FinetuneResult": "newllm_jax.records.results:RunResult",  # its name in version 0.1.0
    "FinetuneRun": "newllm_jax.finetuning.run:FinetuneRun",
    "InputError": "newllm_jax.errors:InputError",
    "NewLLMConfig": "newllm_jax.config:NewLLMConfig",
    "NewLLMResult": "newllm_jax.records.results:RunResult",  # its name in version 0.1.0
    "NewLLMRun": "newllm_jax.newllm.run:NewLLMRun",
    "NumericalError": "newllm_jax.errors:NumericalError",
    "RunResult": "newllm_jax.records.results:RunResult",
    "Sampling": "newllm_jax.decoding.sampling:Sampling",
    "SmolLM2": "newllm_jax.smollm.model:SmolLM2",
    "Stage": "newllm_jax.cascade.stage.model:Stage",
    "Stopped": "newllm_jax.errors:Stopped",
    "WordTokenizer": "newllm_jax.newllm.tokenizer:WordTokenizer",
    "evaluate_ensemble": "newllm_jax.cascade.ensemble:evaluate_ensemble",
    "export": "newllm_jax.systems:export",
    "extract": "newllm_jax.cascade.extraction:extract",
    "finetune": "newllm_jax.finetuning.experiment:finetune",
    "generate": "newllm_jax.generation:generate",
    "generate_all": "newllm_jax.generation:generate_all",
    "hardness": "newllm_jax.cascade.hardness",
    "load_alpaca": "newllm_jax.smollm.alpaca:load_alpaca",
    "load_config": "newllm_jax.config:load_config",
    "load_smollm2": "newllm_jax.smollm.pretrained:load_smollm2",
    "load_wikitext": "newllm_jax.newllm.wikitext:load_wikitext",
    "restore": "newllm_jax.systems:restore",
    "train_cascade": "newllm_jax.cascade.experiment:train_cascade",
    "train_newllm": "newllm_jax.newllm.experiment:train_newllm",
}

__all__ = [
    "CascadeConfig",
    "CascadeResult",
    "CascadeRun",
    "ContextVectorLM",
    "DesignRun",
    "FinetuneConfig",
    "FinetuneResult",
    "FinetuneRun",
    "InputError",
    "NewLLMConfig",
    "NewLLMResult",
    "NewLLMRun",
    "NumericalError",
    "RunResult",
    "Sampling",
    "SmolLM2",
    "Stage",
    "Stopped",
    "WordTokenizer",
    "evaluate_ensemble",
    "export",
    "extract",
    "finetune",
    "generate",
    "generate_all",
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
    import pkgutil

    value = pkgutil.resolve_name(_HOMES[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
