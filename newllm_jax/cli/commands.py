"""The commands: each reads its arguments and calls the library, parts of which are imported where they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from newllm_jax import generation, systems
from newllm_jax.cli.doctor import doctor
from newllm_jax.cli.options import (
    Parser,
    add_deterministic,
    add_log_format,
    add_settings,
    narrator,
    new_file,
    parser_of,
    set_up,
    typed_settings,
)
from newllm_jax.cli.training import cascade, finetune, sweep, train
from newllm_jax.config import AskedPrecision, check, checked_path
from newllm_jax.decoding.exits import Exits
from newllm_jax.errors import InputError
from newllm_jax.files import read_text
from newllm_jax.records.narration import tell
from newllm_jax.systems import SYSTEMS, call

SHELLS = ("bash", "zsh", "fish")
HARDNESS = (  # the settings of a measurement of criteria
    "base_model", "dataset", "dataset_config", "fallback", "train_chunks", "validation_chunks", "whole_rows",
    "hard_ratio", "seed",
)  # fmt: skip

MODEL = "run directory, exported folder, or one on the Hub: owner/name, owner/name@revision"


def generate(argv: Sequence[str]) -> None:
    """`newllm generate`: streams text from a run."""
    parser = Parser(prog="newllm generate", description="Stream text from a trained model.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help=MODEL)
    parser.add_argument("--prompt", default="", help="text to continue; for a SmolLM2 the user's turn")
    parser.add_argument("--prompts", metavar="FILE", help="continue each line of a text file instead, several at a "
                        "time; prints a line of JSON for each")  # fmt: skip
    parser.add_argument("--batch", type=int, default=32, help="with --prompts: the most texts at a time")
    parser.add_argument("--precision", choices=get_args(AskedPrecision), default="fp32", help="of the matrix products")
    parser.add_argument("--max_words", type=int, default=100, help="largest number of words (SmolLM2: tokens)")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature; 0: most probable word")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k most probable words only; 0: from all")
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.95,
        help="sample from the most probable words up to this probability",
    )
    parser.add_argument("--unknown", action="store_true", help="New-LLM: also allow <UNK>")
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling")
    add_deterministic(parser)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    from newllm_jax.decoding.sampling import Sampling

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.unknown)
    options = {"max_words": arguments.max_words, "seed": arguments.seed, "sampling": sampling,
               "precision": arguments.precision}  # fmt: skip
    prompt = arguments.prompt or ""  # argparse makes an empty list of `--`
    if arguments.prompts is not None:
        if prompt:
            raise InputError("prompt: does not go with --prompts, whose lines are the prompts")
        prompts = (
            read_text(checked_path("prompts", arguments.prompts)).replace("\r\n", "\n").removesuffix("\n").split("\n")
        )
        run = systems.restore(arguments.run_dir)
        texts = generation.generate_all(run, prompts, batch=arguments.batch, **options)
        for each, text in zip(prompts, texts, strict=True):
            print(json.dumps({"prompt": each, "text": text}, ensure_ascii=False))
        return
    run, exits = systems.restore(arguments.run_dir), Exits()
    pieces = generation.generate(run, prompt, exits=exits, **options)
    separator = SYSTEMS[run.config.system].separator
    if separator and prompt:  # the text continues the prompt
        print(prompt, end=separator, flush=True)
    for piece in pieces:
        print(piece, end=separator, flush=True)
    print()
    if len(exits.counts) > 1:
        print(f"\ntokens by exit: {exits}")


def evaluate(argv: Sequence[str]) -> None:
    """`newllm evaluate`: measures the model of a run again; for CASCADE prints the ensemble over all tokens."""
    parser = Parser(prog="newllm evaluate", description="Measure the model of a run again.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help=MODEL)
    parser.add_argument(
        "--dynamic", action="store_true", help="also measure a New-LLM that goes on learning from the text (stream)"
    )
    add_deterministic(parser)
    add_log_format(parser)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    results = systems.evaluate(arguments.run_dir, dynamic=arguments.dynamic)
    tell(narrator(arguments), "end", call(SYSTEMS[results["system"]].show, results), results)


def export(argv: Sequence[str]) -> None:
    """`newllm export`: writes the model of a finished run as a folder to publish, with a model card."""
    parser = Parser(prog="newllm export", description="Write a trained model to publish.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a new or empty folder")
    parser.add_argument("--merge", action="store_true", help="LoRA: one whole model instead of the adapters")
    arguments = parser.parse_all(argv)
    print(f"exported to {systems.export(arguments.run_dir, arguments.to, merge=arguments.merge)}")


def frontier(argv: Sequence[str]) -> None:
    """`newllm frontier`: writes and prints the quality of several runs against what a token costs."""
    parser = Parser(prog="newllm frontier", description="Measure quality against compute.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="runs of CASCADE and of fine-tuning, same data")
    parser.add_argument("--elsewhere", default="", metavar="SOURCE", help="also measure on texts of another kind")
    parser.add_argument("--speed", action="store_true", help="also time generation, one text and 32 at a time")
    parser.add_argument("--output", default="frontier", metavar="DIR", help="folder of the results (default frontier)")
    add_log_format(parser)
    arguments = parser.parse_all(argv)
    from newllm_jax.content import finite
    from newllm_jax.files import whole_file
    from newllm_jax.report.frontier import frontier_page, save_frontier

    output = checked_path("output", arguments.output)
    check("output", arguments.output, "a folder or a new name", output.is_dir() or not output.exists())
    content = systems.frontier(arguments.runs, arguments.elsewhere, arguments.speed)
    output.mkdir(parents=True, exist_ok=True)
    page = frontier_page(content)
    for name, text in (("frontier.json", json.dumps(finite(content), indent=1)), ("frontier.md", page)):
        with whole_file(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    save_frontier(output / "frontier.png", content)
    tell(narrator(arguments), "end", f"{page}\nwritten to {output}", {"output": str(output), **content})


def compare(argv: Sequence[str]) -> None:
    """`newllm compare`: writes and prints the tables and curves of several runs."""
    parser = Parser(prog="newllm compare", description="Put several runs beside each other.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or results.json files")
    parser.add_argument("--published", action="store_true", help="add the published CASCADE runs")
    parser.add_argument("--output", metavar="DIR", help="folder for it (default: comparison, beside the runs)")
    arguments = parser.parse_all(argv)
    from newllm_jax.report.compare import check_distinct, comparison_folder, read_results, write_comparison
    from newllm_jax.report.published import PUBLISHED_RUNS

    if arguments.output is not None:
        folder = checked_path("output", arguments.output)
        check("output", arguments.output, "a folder or a new name", folder.is_dir() or not folder.exists())
    results = [read_results(run) for run in arguments.runs]
    check_distinct(arguments.runs)
    if arguments.published and all(run["system"] == "new-llm" for run in results):
        raise InputError("published: only CASCADE has published runs here, and these are runs of New-LLM")
    folder = comparison_folder(arguments.runs) if arguments.output is None else Path(arguments.output)
    path = write_comparison(folder, [*(PUBLISHED_RUNS if arguments.published else []), *results])
    print(f"{path.read_text(encoding='utf-8')}\nwritten to {path.with_suffix('.html')}")


def hardness(argv: Sequence[str]) -> None:
    """`newllm hardness`: measures how well each criterion tells hard tokens, on any base and data or a run's."""
    parser = Parser(
        prog="newllm hardness", allow_abbrev=False, description="Measure how well each criterion tells hard tokens, by "
        "the loss of a base and, where a run is given, by what its hard path gains, with its settings.",
    )  # fmt: skip
    system = SYSTEMS["cascade"]
    parser.add_argument("run_dir", metavar="RUN", nargs="?", help="cascade run of a design, whose base, data and gains "
                        "are measured")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results (default: none is written)")
    add_log_format(parser)
    add_deterministic(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, system, argv, HARDNESS)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    output = None if arguments.output is None else new_file("output", arguments.output)
    settings = typed_settings(arguments, system.config, HARDNESS)
    from newllm_jax.cascade.criteria import measure_hardness
    from newllm_jax.content import finite
    from newllm_jax.files import whole_file
    from newllm_jax.report.criteria import criteria_text

    narrate, written = narrator(arguments), ""
    results = finite(measure_hardness(settings, arguments.run_dir, narrate))
    if output is not None:
        with whole_file(output) as partial:
            partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        written = f"\n\nwritten to {output}"
    tell(narrate, "end", f"\n{criteria_text(results)}{written}", results)


def report(argv: Sequence[str]) -> None:
    """`newllm report`: writes the report and curves of a run again from its results.json, and prints the report."""
    parser = Parser(prog="newllm report", description="Print the report of a finished run.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    print(systems.report(parser.parse_all(argv).run_dir))


def runs(argv: Sequence[str]) -> None:
    """`newllm runs`: lists the runs of a folder, the newest first, with their best figures."""
    parser = Parser(prog="newllm runs", description="List runs and their best figures.", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="folder of run directories (default "
                        "runs)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    arguments = parser.parse_all(argv)
    from newllm_jax.report.runs import list_runs, runs_text

    found = list_runs(checked_path("folder", arguments.folder))
    print(json.dumps([row.to_dict() for row in found], indent=2) if arguments.json else runs_text(found))


def completion(argv: Sequence[str]) -> None:
    """`newllm completion`: prints the script by which a shell completes commands, options and their values."""
    parser = Parser(prog="newllm completion", allow_abbrev=False, description='Print a completion script: '
                    'eval "$(newllm completion bash)" in ~/.bashrc, or for zsh in ~/.zshrc; '
                    "newllm completion fish > ~/.config/fish/completions/newllm.fish")  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads it")
    arguments = parser.parse_all(argv)
    from newllm_jax.cli.completion import completion_script

    print(completion_script(arguments.shell, {name: parser_of(command) for name, command in COMMANDS.items()}))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {  # which may return an exit code
    "train": train,
    "cascade": cascade,
    "finetune": finetune,
    "sweep": sweep,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "frontier": frontier,
    "compare": compare,
    "hardness": hardness,
    "report": report,
    "runs": runs,
    "doctor": doctor,
    "completion": completion,
}
