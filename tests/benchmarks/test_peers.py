"""The search over peers: its settings, what it trains and records, its tables. None of it needs PyTorch."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import peers
from benchmarks.harness.program import run_program
from benchmarks.subjects.peer_config import PeerConfig
from benchmarks.subjects.peer_settings import DEFAULTS, SEARCHES, SIZES, base_config, read_settings, task_config
from benchmarks.tables.peers import peer_table, peer_tables, trial_table
from newllm_jax.errors import InputError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "rnn"}, "kind: must be one of lstm, gpt"),
        ({"layers": 0}, "layers"),
        ({"weight_dropout": 1.0}, "weight_dropout: must be"),
        ({"ema_decay": 1}, "ema_decay"),
        ({"heads": 4}, "heads: must be none in an lstm"),
        ({"attention_dropout": 0.1}, "attention_dropout: must be 0 in a peer of kind lstm"),
        ({"kind": "gpt", "embed": 512, "heads": 7}, "heads: must be a divisor of hidden"),
        ({"kind": "gpt", "embed": 256, "heads": 8}, "embed: must be hidden (512)"),
        ({"kind": "gpt", "embed": 512, "heads": 8, "weight_dropout": 0.1}, "0 in a peer of kind gpt"),
        ({"droput": 0.1}, "droput: no such field"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(InputError) as refusal:
        PeerConfig().override(settings)
    assert says in str(refusal.value)


def test_settings_come_back_from_json():
    config = PeerConfig(layers=3, weight_dropout=0.2, tie=True)
    assert PeerConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("task", "kind"), SEARCHES)
def test_a_search_tries_twelve_settings_of_one_shape(task, kind, size):
    configs = read_settings(None, task, kind, size)
    assert len(configs) == len(DEFAULTS[task, kind]) == 12
    assert {config.title for config in configs} == {base_config(task, kind, size).title}
    assert len({config.learning_rate for config in configs}) > 2
    assert {config.ema_decay for config in configs} == {0, 0.999}
    assert {config.weight_decay for config in configs} == {0, 0.1}


def test_the_tasks_read_what_new_llm_reads():
    words, stream = task_config("words", None, 128), task_config("wikitext2", None, 64)
    assert (words.text, words.vocabulary_size, words.sequence_length) == ("windows", 1000, 64)
    assert (stream.text, stream.vocabulary_size, stream.sequence_length) == ("stream", None, 71)
    assert (words.batch_size, stream.batch_size) == (128, 64)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--task", "wikitext2", "--kind", "gpt"], "kind: must be lstm for the task wikitext2"),
        (["--seeds", "0,x"], "seeds: '0,x'"),
        (["--settings", "absent.json"], "absent.json"),
        (["--epochs", "0"], "positive integer"),
        (["--kind", "rnn"], "--kind"),
        (["--settings", "FILE"], "setting 2: droput: no such field"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, tmp_path, argv, says):
    (tmp_path / "settings.json").write_text('[{}, {"droput": 0.1}]')
    typed = [str(tmp_path / "settings.json") if word == "FILE" else word for word in argv]
    monkeypatch.setattr(sys, "argv", ["peers", *typed])
    assert run_program(peers.main) == 2
    err = capsys.readouterr().err
    assert (err[:7], err.count("\n")) == ("error: ", 1) and says in err


def test_help(capsys):
    with pytest.raises(SystemExit):
        peers.options().parse(["--help"])
    assert "docs/results/peers/TASK-KIND-SIZE-DEVICE.json" in "".join(capsys.readouterr().out.split())


def trained(config, test):
    """A row as a training gives it; the loss is the learning rate."""
    if config.learning_rate == 0.5:
        raise RuntimeError("out of memory\nmore lines")
    best = {"epoch": 1, "val_loss": config.learning_rate + config.seed, "val_ppl": 10 + config.seed}
    row = {"parameters": 1234, "epochs": [best] * config.epochs, "best": best, "seconds": 1.0}
    return row | ({"test": {"loss": 1.0, "ppl": 20.0 + config.seed}} if test else {})


@pytest.fixture
def searched(tmp_path):
    """Searches with a stand-in for training; returns the results that were written."""
    output = tmp_path / "found.json"

    def search(earlier=(), deadline=None, train=trained):
        program = peers.options().parse(["--output", str(output)])
        program.results = {"environment": {"slug": "some"}, "kind": "lstm", "task": "words"}
        configs = [PeerConfig(learning_rate=rate) for rate in (0.3, 0.5, 0.2)]
        peers.Search(program, train, list(earlier), deadline).run(configs, [0, 1], 7)
        return json.loads(output.read_text())

    return search


def test_the_best_setting_is_trained_again_from_every_seed_and_only_then_tested(searched):
    found = searched()
    assert [row.get("error") for row in found["trials"]] == [None, "out of memory", None]
    assert all("test" not in row for row in found["trials"])
    final = [row["settings"] for row in found["final"]]
    assert [(row["learning_rate"], row["seed"], row["epochs"]) for row in final] == [(0.2, 0, 7), (0.2, 1, 7)]
    assert [row["test"]["ppl"] for row in found["final"]] == [20, 21]
    assert found["left_out"] == []


def test_a_limit_is_recorded_and_a_resumed_search_makes_the_rest(searched):
    stopped = searched(deadline=1e-9)
    assert stopped["left_out"] == ["setting 1", "setting 2", "setting 3", "final, seed 0", "final, seed 1"]
    whole, made = searched(), []

    def train(config, test):
        made.append((config.learning_rate, config.seed))
        return trained(config, test)

    found = searched(earlier=[*whole["trials"], whole["final"][0]], train=train)
    assert made == [(0.5, 0), (0.2, 1)]  # what failed is tried again
    assert found == whole


def test_tables(searched):
    found = searched()
    line = peer_table([found]).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "LSTM 2 x 512, embedding 256", "1,234", "3", "10.00 / 11.00", "20.00 / 21.00", "7",
    ]  # fmt: skip
    rates = [line.split("|")[1].strip() for line in trial_table(found).splitlines()[2:]]
    assert rates == ["0.2", "0.3", "0.5"]  # best first, what failed last
    tables = peer_tables({"words-lstm-large-some": found})
    assert set(tables) == {"peers words", "peers wikitext2", "peer trials words-lstm-large-some"}
    assert all(table() for table in tables.values())


def test_tables_without_any_search():
    assert peer_tables({})["peers words"]().startswith("| peer")


def test_tables_of_a_search_without_a_trained_peer(searched):
    assert "| lstm | " in peer_table([searched(deadline=1e-9)])
