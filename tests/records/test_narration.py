"""What a run tells: lines for people, events for programs."""

import json
import math

from newllm_jax.records.narration import JsonLines, tell, warn


def test_a_function_gets_lines_and_an_object_of_events_gets_facts():
    lines, written = [], []
    for narrate in (lines.append, JsonLines(written.append)):
        tell(narrate, "epoch", "epoch 1: PPL inf", {"epoch": 1, "val_ppl": math.inf})
        tell(narrate, "end", ["next  this", "      that"], {"next": ["this", "that"]})
        warn(narrate, "look out")
        narrate("a mere line")
    assert lines[:3] == ["epoch 1: PPL inf", "next  this", "      that"]
    assert "| look out " in lines[3] and lines[3].count("\n") == 2
    assert lines[4:] == ["a mere line"]
    assert [json.loads(line) for line in written] == [
        {"event": "epoch", "epoch": 1, "val_ppl": None},  # JSON has no infinity
        {"event": "end", "next": ["this", "that"]},
        {"event": "warning", "text": "look out"},
        {"event": "note", "text": "a mere line"},
    ]
