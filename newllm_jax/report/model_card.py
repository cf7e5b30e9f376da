"""The model card of an exported model: what it is, how it was trained, what it scored, how to load it, its limits.

It begins with the metadata that the Hugging Face Hub reads. Texts of a run (its name, its sources) are quoted in both
parts: none can end a line, a table's cell or the metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from newllm_jax.records.directory import RunDir
from newllm_jax.report.cascade_tables import ensemble_table, verdict
from newllm_jax.report.finetune import model_text
from newllm_jax.report.tables import markdown_table, number
from newllm_jax.sources.weights import DEFAULT_BASE, PACKAGE

# What of a configuration says nothing about how a model was trained, or something about the machine.
NOT_SHOWN = {"mirror", "tracker", "checkpoint_every", "save_minutes", "time_limit", "fallback", "examples"}
LICENCES = {PurePath(DEFAULT_BASE).parent.name: "apache-2.0"}  # of base models, by who publishes them

ABOUT = {
    "new-llm": "A language model without attention: it reads word by word and remembers the words before in one "
    "vector of fixed size (New-LLM).",
    "cascade": "Newly trained stages for the tokens that are hard for a frozen base (CASCADE). **They are nothing "
    "without that base, which is not in this folder.**",
    "model": "A fine-tuned Llama.",
    "adapter": "LoRA adapters for a Llama. **The base is not in this folder.**",
}
LIMITS = {
    "new-llm": "It knows the words of `vocabulary.json` only, and writes `<UNK>` for all others. It is a small model "
    "for research, trained on one kind of text: what it writes is neither true nor checked.",
    "model": "It was trained for research, on few examples: what it writes is neither true nor checked, and it has "
    "the faults of its base.",
}
LIMITS |= {"adapter": LIMITS["model"], "cascade": LIMITS["model"]}


def model_card(results: Mapping[str, Any], name: str, exported: RunDir) -> str:
    """The content of `README.md`.

    Args:
      results: of the run, see `check_results`.
      name: of the folder.
      exported: the run of the folder.
    """
    system = results["system"]
    kind = exported.description["export"].get("kind", system)
    return f"""{_metadata(results, kind)}
# {_escaped(name)}

{ABOUT[kind]} Made with newllm_jax.

{_warnings(results)}{_figures(results)}
## Training

{_training(results, exported)}
## Use

{_use(results, kind)}
## Limits

{LIMITS[kind]}

The code of newllm_jax is under Apache-2.0. Base and data have terms of their own: whoever publishes this model sees \
to it that they allow it.
"""


def _metadata(results: Mapping[str, Any], kind: str) -> str:
    """The YAML head; every text in it is a JSON string, which YAML reads as such."""
    source, base = results["data"]["source"], results.get("base")
    entries: dict[str, Any] = {
        "library_name": {"model": "transformers", "adapter": "peft"}.get(kind, "newllm_jax"),
        "pipeline_tag": "text-generation",
        "tags": ["newllm_jax", results["system"], *(["lora"] if kind == "adapter" else [])],
    }
    if base is None:
        entries["license"] = "apache-2.0"
    else:
        model = DEFAULT_BASE if base["source"] == PACKAGE else base["source"]
        if _is_hub_name(model):
            entries["base_model"] = model
        if (licence := LICENCES.get(model.partition("/")[0])) is not None:
            entries["license"] = licence
    if _is_hub_name(source):
        entries["datasets"] = [source]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in entries.items()), "---"])


def _warnings(results: Mapping[str, Any]) -> str:
    """What replaced a source that was asked for."""
    lines = [
        f"> **Not the {name} that was asked for.** {_code(_public(part['asked']))} was not available, so this is "
        f"{_code(_public(part['source']))}. No figure here can be compared with a published one.\n"
        for name, part in (("data", results["data"]), ("base", results.get("base", {})))
        if part.get("fallback")
    ]
    return "".join(f"{line}\n" for line in lines)


def _figures(results: Mapping[str, Any]) -> str:
    data = _code(_public(results["data"]["source"]))
    if results["system"] == "cascade":
        return f"## Figures\n\nOver all validation tokens of {data}:\n\n{ensemble_table(dict(results))}\n\n" \
               f"{verdict(dict(results))}\n"  # fmt: skip
    best = results["best"]
    rows = [["validation", number(best["val_loss"], 4), number(best["val_ppl"])]]
    if "test" in results:
        rows.append(["test", number(results["test"]["loss"], 4), number(results["test"]["ppl"])])
    if "base" in results:
        rows.append(["validation, the base before", number(results["base"]["val_loss"], 4),
                     number(results["base"]["val_ppl"])])  # fmt: skip
    unit = "word" if results["system"] == "new-llm" else "token"
    table = markdown_table(["split", f"loss (nats a {unit})", "perplexity"], rows)
    return f"## Figures\n\nOn {data}, after epoch {best['epoch']}:\n\n{table}\n"


def _training(results: Mapping[str, Any], exported: RunDir) -> str:
    """What it was trained from, on and how long, and the settings that are not the usual ones."""
    environment, data, base = results["environment"], results["data"], results.get("base")
    facts = {"run": results["name"], "data": f"{_public(data['source'])} (sha256 {data['fingerprint'][:12]})"}
    if base is not None:
        facts["base"] = (
            f"{_public(base['source'])} (sha256 {base['fingerprint'][:12]}): {base['layers']} layers, "
            f"{base['parameters']:,} parameters"
        )
    if results["system"] == "finetune":
        facts["model"] = model_text(results["config"], {"layers": results["base"]["layers"], **results})
    elif results["system"] == "new-llm":
        facts["parameters"] = f"{results['parameters']:,}"
    epochs = [stage["epochs"] for stage in results.get("stages", [results])]
    facts |= {
        "epochs": " + ".join(str(len(each)) for each in epochs),
        "device": f"{environment['device']} ({environment['platform']}), {environment['precision']}",
        "time": f"{results['seconds']:.0f} s",
    }
    settings = {key: value for key, value in results["config"].items() if key not in NOT_SHOWN}
    rows = [[_escaped(name), _escaped(fact)] for name, fact in facts.items()]
    settings_text = ", ".join(f"{key} = {_public(value)}" for key, value in settings.items())
    table = markdown_table(["what", "which"], rows)
    return f"{table}\n\nSettings: {_code(settings_text)}. `newllm.json` has them all.\n"


def _use(results: Mapping[str, Any], kind: str) -> str:
    ours = """With newllm_jax (the folder, or its name on the Hub):

```python
import newllm_jax

run = newllm_jax.restore("this/folder")
print("".join(newllm_jax.generate(run, "Hello")))
```
"""
    if kind == "new-llm":
        return ours.replace('"".join', '" ".join')
    base = _code(_public(results["base"]["source"]))
    if kind == "cascade":
        return f"""{ours}
`transformers` cannot run it: no model there has tokens that leave it at different depths. The base is read from \
{base}, and must have the fingerprint above.
"""
    loaded = ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    name, imports = "transformers", ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if kind == "adapter":
        name, loaded = "peft", ["model = AutoPeftModelForCausalLM.from_pretrained(folder)"]
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    code = "\n".join([*imports, "", 'folder = "this/folder"', *loaded,
                      "tokenizer = AutoTokenizer.from_pretrained(folder)"])  # fmt: skip
    quantised = ""
    if kind == "adapter" and results["base"]["source"] == PACKAGE:
        quantised = (f"\nThe adapters were trained on the base in 4 bits ({base}), as newllm_jax reads them; `peft` "
                     f"puts them on `{DEFAULT_BASE}` in full precision: figures differ a little.\n")  # fmt: skip
    return f"{ours}\nWith {name}:\n\n```python\n{code}\n```\n{quantised}"


def _is_hub_name(source: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def _public(value: Any) -> str:
    """A value as a card shows it: of a path on this machine the last name only."""
    text = str(value)
    return text if _is_hub_name(text) or not isinstance(value, str) else PurePath(text).name


def _code(text: str) -> str:
    """A text as inline code: nothing in it is markup."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _escaped(text: str) -> str:
    """A text in one line and in one cell, in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
