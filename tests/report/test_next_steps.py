"""What to do next: commands that the command line takes."""

import shlex
from pathlib import Path

import pytest

from newllm_jax.cli.commands import COMMANDS
from newllm_jax.cli.options import parser_of
from newllm_jax.report.next_steps import after_cascade, after_finetune, after_newllm, after_sweep

RUN = Path("runs/a run")
NEWLLM = {"config": {"num_epochs": 2, "patience": 5, "schedule": "constant", "decay_epochs": None}, "epochs": [1, 2]}
COSINE = {**NEWLLM, "config": {**NEWLLM["config"], "schedule": "cosine"}}
CASCADE = {"config": {"test_chunks": 0, "num_stages": 2}}
TESTED = {"config": {"test_chunks": 8, "num_stages": 1}}
DESIGN = {"config": {"test_chunks": 0, "num_stages": 1}}
FINETUNED = {"config": {"test_chunks": 0, "num_epochs": 3, "patience": 5}, "epochs": [1, 2]}
MEMBERS = {"members": [
    {"run": "members/001", "best": {"val_loss": 3.0}}, {"run": "members/002", "best": {"val_loss": 2.0}},
    {"run": "members/003", "failed": "epoch 1"}, {"run": "members/004", "best": {"val_loss": None}},
]}  # fmt: skip


@pytest.mark.parametrize(
    "after, results, second",
    [
        (after_newllm, NEWLLM, "newllm train --resume 'runs/a run' --num_epochs 4"),
        (after_newllm, {**NEWLLM, "epochs": [1]}, "newllm train --resume 'runs/a run' --patience 10"),
        (after_newllm, COSINE, "newllm report 'runs/a run'"),  # its learning rate has decayed
        (after_cascade, CASCADE, "newllm cascade --resume 'runs/a run' --num_stages 3"),
        (after_cascade, TESTED, "newllm frontier 'runs/a run'"),
        (after_cascade, DESIGN, "newllm evaluate 'runs/a run'"),
        (after_finetune, FINETUNED, "newllm finetune --resume 'runs/a run' --patience 10"),
        (after_finetune, {"config": {"test_chunks": 8}}, "newllm frontier 'runs/a run'"),
        (after_sweep, MEMBERS, "newllm report 'runs/a run/members/002'"),
    ],
)
def test_next_steps_are_commands(after, results, second):
    steps = after(RUN, results)
    assert steps[1] == second
    for step in steps:
        program, command, *typed = shlex.split(step)
        assert program == "newllm"
        parser_of(COMMANDS[command]).parse_all(typed)  # raises where the command does not take it


def test_a_sweep_without_a_member_that_was_trained_has_none():
    assert after_sweep(RUN, {"members": MEMBERS["members"][2:3]}) == []
