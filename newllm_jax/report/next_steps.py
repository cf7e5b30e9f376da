"""What to do with a run that has ended: commands to type, each with a word on what it does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Steps: TypeAlias = list[tuple[str, str]]  # commands, and what each does

PROMPT = "The city of"
QUESTION = "Why is the sky blue?"
PAGE = "report.html"  # of a run, for a browser


def after_newllm(run: Path, results: Mapping[str, Any]) -> Steps:
    """The next steps of a run of New-LLM."""
    return [_generate(run, PROMPT), *_more_epochs("train", run, results), *_report(run)]


def after_cascade(run: Path, results: Mapping[str, Any]) -> Steps:
    """The next steps of a run of CASCADE: its frontier where it has chunks for one, else one more stage."""
    config, path = results["config"], shlex.quote(str(run))
    steps = [_generate(run, QUESTION), (f"newllm evaluate {path}", "the ensemble over all tokens again")]
    if config["test_chunks"]:
        steps[1] = (f"newllm frontier {path}", "quality against compute")
    elif config["num_stages"] > 1 or len(results["ensemble"]) > 2:
        more = f"newllm cascade --resume {path} --num_stages {config['num_stages'] + 1}"
        steps[1] = (more, "one more stage")
    return [*steps, *_report(run)]


def after_finetune(run: Path, results: Mapping[str, Any]) -> Steps:
    """The next steps of a fine-tuning."""
    frontier = [(f"newllm frontier {shlex.quote(str(run))}", "quality against compute")]
    more = frontier if results["config"]["test_chunks"] else _more_epochs("finetune", run, results)
    return [_generate(run, QUESTION), *more, *_report(run)]


def after_sweep(run: Path, results: Mapping[str, Any]) -> Steps:
    """The next steps of a sweep, with its best member."""
    best = min((row for row in results["members"] if "failed" not in row), key=_loss_of, default=None)
    if best is None:
        return []
    member = run / best["run"]
    return [_generate(member, PROMPT), *_report(member)]


def _loss_of(row: Mapping[str, Any]) -> float:
    loss = row["best"]["val_loss"]
    return math.inf if loss is None else loss


def _generate(run: Path, prompt: str) -> tuple[str, str]:
    return f'newllm generate {shlex.quote(str(run))} --prompt "{prompt}"', "text from it"


def _more_epochs(command: str, run: Path, results: Mapping[str, Any]) -> Steps:
    """How the run goes on; nothing where it cannot, because its learning rate has decayed."""
    config, again = results["config"], f"newllm {command} --resume {shlex.quote(str(run))}"
    if len(results["epochs"]) < config["num_epochs"]:
        return [(f"{again} --patience {2 * config['patience']}", "more epochs, after it stopped early")]
    if config.get("schedule") == "cosine" and config["decay_epochs"] is None:
        return []
    return [(f"{again} --num_epochs {2 * config['num_epochs']}", "more epochs")]


def _report(run: Path) -> Steps:
    browser = f", which {PAGE} in that folder shows in a browser" if (run / PAGE).is_file() else ""
    return [(f"newllm report {shlex.quote(str(run))}", f"the report{browser}")]
