"""Every command that the documentation prints, run: as printed where it reads runs, as a dry run where it trains.

A command that is in none of the classes below fails, so nothing is left out silently.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import pytest

from newllm_jax import finetune, load_config, train_cascade, train_newllm
from newllm_jax.cascade import plan as cascade_plan
from newllm_jax.cli.commands import COMMANDS
from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, config_names
from newllm_jax.files import whole_file
from newllm_jax.finetuning import plan as finetuning_plan
from newllm_jax.newllm import plan as newllm_plan
from newllm_jax.newllm.sweep import sweep_newllm
from newllm_jax.smollm import generation_speed
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.training import memory, precision
from tests.reliability.tiny import write_base

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("configs/*/*.toml"))]
PAGES.remove(ROOT / "CHANGELOG.md")  # tells of commands as they were

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`((?:python|newllm|make|pip|sbatch|kubectl|sky) [^`]+)`")
HEADER = re.compile(r"^#   ((?:python|newllm) .*?)(?:   .*)?$", re.M)  # of a configuration
SCRIPTS = {"train.py": "train", "cascade.py": "cascade"}
TRAINING = {"train", "cascade", "finetune", "sweep"}
# What a run is a run of where its name does not say it.
GENERIC = {
    "compare": "cascade",
    "frontier": "design",
    "hardness": "design",
    "cascade": "cascade",
    "finetune": "finetune",
}
ONE_RUN_OF = re.compile(r"(?:\S*/)?([a-z]\w*(?:-[a-z]\w*)*)-(?:\.\.\.|\*|\d{8}-\d{6})/?")
ANY_RUN = re.compile(r"RUN(_DIR)?|runs/[A-Z]+")


def printed(page: Path) -> Iterator[str]:
    """The commands of a page: lines of its shell blocks, and inline code that starts with a program's name."""
    text = page.read_text()
    if page.suffix == ".toml":
        yield from HEADER.findall(text)
        return
    for language, block in FENCE.findall(text):
        lines = block.replace("\\\n", " ").splitlines() if language in ("bash", "sh", "console") else []
        for line in lines:
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                yield from (part.strip() for part in shlex.join(words).split(" '&&' "))
    yield from (" ".join(found.split()) for found in INLINE.findall(FENCE.sub("", text)))


@pytest.fixture(scope="session")
def run_of(request, small, tiny, tmp_path_factory) -> Callable[[str], Path]:
    """A finished run of a kind, trained where a command first asks for it."""
    quiet = {"narrate": lambda _: None, "run_root": tmp_path_factory.mktemp("documented")}
    rows = {"base_model": tiny.base_model, "dataset": tiny.dataset}
    # Settings that other tests have too, so that a session compiles their programs once.
    stream = {**small, "text": "stream", "batch_size": 4, "num_epochs": 1}
    design = CascadeConfig(
        **rows, train_chunks=9, validation_chunks=6, calibration_chunks=6, test_chunks=6, whole_rows=True, num_stages=1,
        batch_size=4, num_epochs=2, patience=2, entry_layer=1, context="sequence", start="base", weights="lora", rank=2,
        head="base", trained_on="hard", criterion="entropy", hard_ratio=0.4, learning_rate=0.02,
    )  # fmt: skip
    tuned = FinetuneConfig(**rows, train_chunks=9, validation_chunks=3, batch_size=4, num_epochs=1)
    members = NewLLMConfig(
        dataset="builtin", vocabulary_size=50, embed_dim=16, hidden_dim=16, context_dim=16, num_layers=2,
        sequence_length=8, stride=8, batch_size=1024, num_epochs=1,
    )  # fmt: skip
    trainings = {
        "new-llm": lambda: request.getfixturevalue("small_run"),
        "stream": lambda: train_newllm(load_config("baseline", stream), **quiet).run_dir,
        "cascade": lambda: train_cascade(replace(tiny, num_stages=2, num_epochs=1), **quiet).run_dir,
        "design": lambda: train_cascade(design, **quiet).run_dir,
        "finetune": lambda: finetune(tuned, **quiet).run_dir,
        "sweep": lambda: sweep_newllm(members, {"seed": [0, 1]}, **quiet).run_dir,
    }
    return cache(lambda kind: Path(trainings[kind]()))


@pytest.fixture(scope="session")
def base_of_135m(tmp_path_factory) -> Path:
    """A model folder with the sizes of SmolLM2-135M, a small tokenizer, and weights that no plan reads."""
    folder = tmp_path_factory.mktemp("135m")
    write_base(folder)
    settings = json.loads((folder / "config.json").read_text())
    names = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}  # fmt: skip
    assert settings.keys() >= names.keys()
    with whole_file(folder / "config.json") as partial:
        partial.write_text(json.dumps({**settings, **names}))
    assert LlamaConfig.from_dict({**settings, **names}).num_layers == 30
    return folder


def plan_for_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with devices, memory and precisions enough for what is planned, which is not compiled."""
    enough = lambda *_, **__: ("this machine", 2**45)  # noqa: E731
    monkeypatch.setattr(memory, "device_memory", enough)
    monkeypatch.setattr(memory, "host_memory", enough)
    monkeypatch.setattr(precision, "CAPABILITY_MAJOR", {})
    for plan in (newllm_plan, cascade_plan, finetuning_plan):
        monkeypatch.setattr(plan, "planned_memory", lambda *_: 2**20)
    monkeypatch.setattr(cascade_plan, "planned_design_memory", lambda *_: 2**20)
    monkeypatch.setattr(cascade_plan, "disk_bytes", lambda *_: 2**20)


@pytest.fixture
def execute(newllm, run_of, base_of_135m, corpus, tmp_path, monkeypatch):
    """Runs a command of a page in an empty folder. Raises AssertionError where it is not as the program has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")  # to which --deterministic adds
    for name, fewer in (("PROMPT", 8), ("TOKENS", 16), ("REPEATS", 1)):
        monkeypatch.setattr(generation_speed, name, fewer)

    def command(name: str, typed: list[str]) -> None:
        assert name in COMMANDS, f"newllm {name}: no such command"
        typed = [str(tmp_path) + word if word.startswith("/") else word for word in typed if word != "..."]
        trains = name in TRAINING and not {"--resume", "--help"} & {*typed}
        if trains:
            plan_for_any_machine(monkeypatch)
            typed += ["--dry_run", "--dataset", "builtin", "--dataset_config", ""]
            typed += ["--base_model", base_of_135m] if name in ("cascade", "finetune") else []
            if "--mesh" in typed:
                monkeypatch.setattr(jax, "device_count", lambda: 16)
        else:
            offline(name, typed)
        if "--help" in typed:
            with pytest.raises(SystemExit, match="0"):
                newllm(name, *typed)
            return
        code, out, err = newllm(name, *typed)
        assert code == 0, err
        assert json.loads(out) if trains else out

    def offline(name: str, typed: list[str]) -> None:
        """Puts runs where a command looks for them, and names small sources that are here."""
        for word in typed:
            if kind := kind_of(word.removeprefix(str(tmp_path)), name):
                shutil.copytree(run_of(kind), tmp_path / word, dirs_exist_ok=True)
        if name == "runs":
            shutil.copytree(run_of("new-llm"), tmp_path / "runs" / "advanced")
        if "--prompts" in typed:
            Path(typed[typed.index("--prompts") + 1]).write_text("w1\nw2 w3\n")
        if "--precision" in typed:  # half precision is computed here too, if slowly
            monkeypatch.setattr(precision, "CAPABILITY_MAJOR", {})
        if "--elsewhere" in typed:
            typed[typed.index("--elsewhere") + 1] = corpus
        if name == "hardness" and not any(kind_of(word, name) for word in typed):
            config = json.loads((run_of("design") / "config.json").read_text())["config"]
            typed += [
                f"--{key}={config[key]}" for key in ("base_model", "dataset", "train_chunks", "validation_chunks")
            ]

    def run(text: str) -> None:
        words = shlex.split(text, comments=True)
        while "=" in words[0]:  # a variable of the environment
            words = words[1:]
        match words:
            case ["python", script, *typed] if script in SCRIPTS:
                assert (ROOT / script).is_file()
                command(SCRIPTS[script], typed)
            case ["python", "-m", "newllm_jax", name, *typed] | ["newllm", name, *typed]:
                command(name, typed)
            case _:
                check_other(words)

    return run


def kind_of(word: str, command: str) -> str | None:
    """What a word of a command that stands for a run directory is a run of; None for another word."""
    if ANY_RUN.fullmatch(word):
        return GENERIC.get(command, "new-llm")
    if not (found := ONE_RUN_OF.fullmatch(word)):
        return None
    system, _, config = found[1].partition("-")
    if system == "cascade" and config:
        return "cascade" if load_config(config, config_class=CascadeConfig).has_published_design else "design"
    if system in ("cascade", "finetune", "sweep"):
        return "design" if command in ("hardness", "frontier") else system
    known = system in config_names("newllm")  # others are files that a page has written
    return "stream" if known and load_config(system).text == "stream" else "new-llm"


def check_other(words: list[str]) -> None:
    """Checks another program's command. Raises AssertionError for what cannot be right, or is in no class."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    match words:
        case ["python" | ".venv/bin/python", "-m", module, *typed] if module.split(".")[0] in ("benchmarks", "tests"):
            file = ROOT / module.rstrip(".").replace(".", "/")  # `tests.reliability.`: any of a folder
            assert file.is_dir() or file.with_suffix(".py").is_file(), module
            if module.startswith("benchmarks.") and hasattr(imported := importlib.import_module(module), "options"):
                imported.options().parse(typed)  # raises InputError for an option that is not there
        case ["python", file] if file.startswith("docs/"):
            assert (ROOT / file).is_file()  # an example, which has a test of its own
        case ["make", *targets]:
            call = ["make", "-n", *targets, f"PYTHON={sys.executable}"]
            done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        case ["pip", "install", *options, what]:
            assert set(options) <= {"-q", "-e"}
            named = re.fullmatch(r"(?:\.|newllm_jax|newllm-jax)(?:\[(.*)\])?", what)
            assert named and set(filter(None, (named[1] or "").split(","))) <= extras.keys()
        case ["sbatch" | "kubectl" | "sky", *_, file]:
            assert (ROOT / file).is_file()
        case ["python", "-m", "newllm_jax"] | ["pip", "install"]:  # mentions
            pass
        case ["git", "clone", "<this repository>" | "<this", *_] | ["cd", "newllm_jax"]:
            pass
        case _:
            raise AssertionError(f"{shlex.join(words)}: in no class of commands")


def with_kinds(text: str) -> str:
    """A command with the kind of each run instead of its name; commands that then are equal do the same."""
    words = text.split()
    return " ".join(kind_of(word, words[1]) or word for word in words if word != "...")


def is_mention(text: str, others: Iterable[str]) -> bool:
    """Whether it names a command alone, or ends in dots that one of the others fills in."""
    words = text.split()
    if words[0] == "newllm" and len(words) == 2 and words[1] not in ("doctor", "runs"):
        return words[1] in COMMANDS
    return words[-1] == "..." and any(other.startswith(f"{with_kinds(text)} ") for other in others)


DIFFERENT = {with_kinds(text): text for page in reversed(PAGES) for text in printed(page)}
TEXTS = sorted(text for text in DIFFERENT.values() if not is_mention(text, DIFFERENT))


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_commands_of_the_pages_run(execute, text):
    execute(text)


def test_the_pages_have_commands():
    assert len(TEXTS) > 80


@pytest.mark.parametrize(
    "wrong",
    [
        "python train.py --config advanced --batchsize 3",
        "python train.py --config advance",
        "python cascade.py --config plus --flops most",
        "newllm finetune --config last8 --mesh data=64",
        "newllm fly runs/advanced-...",
        "newllm generate runs/advanced-... --promt x",
        "newllm evaluate runs/advanced-... --dynamic",
        "python -m benchmarks.absent",
        "make quickstrat",
        'pip install -e ".[cuda11]"',
        "curl example.org",
    ],
)
def test_a_wrong_command_is_found(execute, wrong):
    with pytest.raises(AssertionError):
        execute(wrong)
