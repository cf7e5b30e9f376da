"""Results that a report can be made of, and every way in which one entry of them can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from newllm_jax.errors import InputError
from newllm_jax.records.shape import SHAPES, check_results
from newllm_jax.report.compare import comparison, read_results

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FILES = {"new-llm": "newllm/advanced-seed0.json", "cascade": "quickstart/cascade-published.json",
         "finetune": "cascade/finetune-135m-lr1e-5.json"}  # fmt: skip


def read(system):
    return json.loads((RESULTS / FILES[system]).read_text())


def entries(shape, path=()):
    """The paths of all entries of a shape; of a list the first item."""
    yield path, shape
    if isinstance(shape, dict):
        for key, inner in shape.items():
            yield from entries(inner, (*path, key))
    if isinstance(shape, list):
        yield from entries(shape[0], (*path, 0))


def name_of(path):
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


@pytest.mark.parametrize("system", FILES)
def test_committed_results_have_the_shape(system):
    results = read(system)
    check_results(results, Path("results.json"))
    with pytest.raises(InputError, match="data"):
        check_results({**results, "data": 5}, Path("results.json"))


WRONG = [[], {}, "x", "a\nb", 5, 1.5, True, None, [5], {"a": 1}]


def fits(value, shape):
    if value is None:
        return shape == float | None
    if value == [5]:
        return shape == [float]
    allowed = {str: [str], int: [int], float: [int, float], float | None: [int, float]}
    return not isinstance(shape, dict | list) and type(value) in allowed[shape]


@pytest.mark.parametrize("system", FILES)
def test_every_entry_that_is_missing_or_of_another_type_is_named(system):
    results, tried = read(system), 0
    for path, shape in list(entries(SHAPES[system]))[1:]:
        inner = results
        for key in path[:-1]:
            inner = inner[key]
        right = inner[path[-1]]
        for wrong in WRONG:
            if wrong == "a\nb" or not fits(wrong, shape):
                inner[path[-1]] = wrong
                with pytest.raises(InputError) as raised:
                    check_results(results, Path("results.json"))
                assert str(raised.value).startswith("results.json: damaged, or not the whole results of a run (")
                assert name_of(path) in str(raised.value) and "\n" not in str(raised.value)
                tried += 1
        if isinstance(inner, dict):
            del inner[path[-1]]
            with pytest.raises(InputError) as raised:
                check_results(results, Path("results.json"))
            assert f"({name_of(path)}: is missing)" in str(raised.value)
        inner[path[-1]] = right
    assert tried > 300


@pytest.mark.parametrize(
    ("name", "right"),
    [("layers", 24), ("start", {"val_loss": 2.4, "val_ppl": 11.0}), ("config.adapter", "lora"), ("config.rank", 16),
     ("config.trained_layers", None), ("config.dropped_layers", [14, 20])],
)  # fmt: skip
def test_what_earlier_results_lack_is_checked_where_it_is(name, right):
    results = read("finetune")
    part, _, key = name.rpartition(".")
    content = results[part] if part else results
    assert key not in content
    content[key] = right
    check_results(results, Path("results.json"))
    content[key] = 1.5
    with pytest.raises(InputError, match=re.escape(f"results of a run ({name}: ")):
        check_results(results, Path("results.json"))


@pytest.mark.parametrize(
    ("system", "name", "right", "wrong", "said"),
    [
        ("new-llm", "samples", [{"epoch": 1, "prompt": "", "text": "a\nb"}], [{"epoch": 1, "prompt": ""}],
         "samples[0].text: is missing"),
        ("new-llm", "samples", [{"epoch": 1, "prompt": "", "text": ""}], [], "samples: must be a list that is not"),
        ("finetune", "samples", [{"epoch": 1, "prompt": "a", "text": ""}], [{"epoch": 1, "prompt": 5, "text": ""}],
         "samples[0].prompt: must be a text, not 5"),
        ("cascade", "example", {"tokens": ["\n", "b"], "exits": [0, 2]}, {"tokens": ["a", "b"], "exits": [0]},
         "example.exits: must be one for each of the 2 tokens, not 1"),
        ("cascade", "example", {"tokens": ["a"], "exits": [0]}, {"tokens": ["a"], "exits": [-1]},
         "example.exits: must be 0 or more, not -1"),
        ("cascade", "test", [{"stages": 0, "loss": 1.0, "ppl": None, "flops": 1.0}], [{"stages": 0}],
         "test[0].loss: is missing"),
    ],
)  # fmt: skip
def test_what_only_some_results_have_is_checked_where_it_is(system, name, right, wrong, said):
    check_results({**read(system), name: right}, Path("results.json"))
    with pytest.raises(InputError, match=re.escape(f"results of a run ({said}")):
        check_results({**read(system), name: wrong}, Path("results.json"))


def test_an_entry_of_every_item_of_a_list_is_checked():
    results = read("cascade")
    results["ensemble"][-1]["flops"] = "x"
    with pytest.raises(InputError, match=re.escape("(ensemble[].flops: 'x' is not a number)")):
        check_results(results, Path("results.json"))


@pytest.mark.parametrize("content", [5, None, [], "x", {}, {"system": "chess"}, {"system": []}])
def test_what_is_no_result(content, tmp_path):
    file = tmp_path / "some.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"some.json: "):
        read_results(file)
    with pytest.raises(InputError, match=r"some.json: no results of a run"):
        check_results(content, file)


def test_stages_and_ensembles_that_do_not_fit_together():
    results = read("cascade")
    results["ensemble"].pop()
    with pytest.raises(InputError, match=r"ensemble: must be those with 0 to all stages, not \[0, 1\]"):
        check_results(results, Path("results.json"))
    results["stages"][0]["stage"] = 2
    with pytest.raises(InputError, match=r"stages: must be numbered from 1, not \[2, 2\]"):
        check_results(results, Path("results.json"))


def test_results_without_a_name_have_that_of_their_file(tmp_path):
    results = read("new-llm")
    del results["name"]
    (tmp_path / "some.json").write_text(json.dumps(results))
    assert "| some " in comparison([read_results(tmp_path / "some.json")])


@pytest.mark.parametrize("key", ["base", "ensemble"])
def test_what_another_system_has_is_refused(key):
    with pytest.raises(InputError, match=f"{key}: must be absent from results of new-llm"):
        check_results({**read("new-llm"), key: [3]}, Path("results.json"))


def test_fingerprints_are_texts():
    results = read("new-llm")
    results["data"]["fingerprint"] = []
    with pytest.raises(InputError, match=r"data.fingerprint: \[\] is not a text"):
        check_results(results, Path("results.json"))
