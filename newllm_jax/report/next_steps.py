"""What to do with a run that has ended: commands to type."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from newllm_jax.training.history import has_decayed

PROMPT = "The city of"
QUESTION = "Why is the sky blue?"


def after_newllm(run: Path, results: Mapping[str, Any]) -> list[str]:
    """The next steps of a run of New-LLM: text, more epochs, the report."""
    return [_generate(run, PROMPT), *_more_epochs("train", run, results), _report(run)]


def after_cascade(run: Path, results: Mapping[str, Any]) -> list[str]:
    """The next steps of a run of CASCADE: text, its frontier where it has chunks for one, the report.

    Runs of earlier versions lack settings that came later.
    """
    config, path = results["config"], shlex.quote(str(run))
    if config.get("test_chunks"):
        measured = f"newllm frontier {path}"
    elif config["num_stages"] > 1:
        measured = f"newllm cascade --resume {path} --num_stages {config['num_stages'] + 1}"
    else:
        measured = f"newllm evaluate {path}"
    return [_generate(run, QUESTION), measured, _report(run)]


def after_finetune(run: Path, results: Mapping[str, Any]) -> list[str]:
    """The next steps of a fine-tuning: text, its place on a frontier or more epochs, the report."""
    frontier = [f"newllm frontier {shlex.quote(str(run))}"]
    more = frontier if results["config"].get("test_chunks") else _more_epochs("finetune", run, results)
    return [_generate(run, QUESTION), *more, _report(run)]


def after_sweep(sweep: Path, results: Mapping[str, Any]) -> list[str]:
    """The next steps of a sweep: those of its best member."""
    finished = [row for row in results["members"] if "failed" not in row]
    members = [sweep / row["run"] for row in sorted(finished, key=_loss)]
    return [_generate(members[0], PROMPT), _report(members[0])] if members else []


def _loss(row: Mapping[str, Any]) -> float:
    loss = row["best"]["val_loss"]
    return math.inf if loss is None else loss


def _generate(run: Path, prompt: str) -> str:
    return f'newllm generate {shlex.quote(str(run))} --prompt "{prompt}"'


def _more_epochs(command: str, run: Path, results: Mapping[str, Any]) -> list[str]:
    """How the run goes on; nothing where it cannot, because its learning rate has decayed."""
    config, again = results["config"], f"newllm {command} --resume {shlex.quote(str(run))}"
    if len(results["epochs"]) < config["num_epochs"]:
        return [f"{again} --patience {2 * config['patience']}"]  # it stopped early
    return [] if has_decayed(config) else [f"{again} --num_epochs {2 * config['num_epochs']}"]


def _report(run: Path) -> str:
    return f"newllm report {shlex.quote(str(run))}"
