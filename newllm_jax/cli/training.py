"""The commands that train: train, cascade, finetune, sweep."""

def train(argv: Sequence[str]) -> None:
    """`newllm train`: trains New-LLM, or continues a run."""
    _train(Parser(prog="train.py", description="Train New-LLM.", allow_abbrev=False), argv, SYSTEMS["new-llm"])


def cascade(argv: Sequence[str]) -> None:
    """`newllm cascade`: trains the stages of CASCADE and evaluates the ensemble, or continues a run."""
    description = "Train CASCADE on a frozen SmolLM2."
    _train(Parser(prog="cascade.py", description=description, allow_abbrev=False), argv, SYSTEMS["cascade"])


def finetune(argv: Sequence[str]) -> None:
    """`newllm finetune`: fine-tunes a SmolLM2, whole or in part, on the chunks of CASCADE, or continues a run."""
    parser = Parser(prog="newllm finetune", description="Fine-tune a SmolLM2, whole or in part.", allow_abbrev=False)
    _train(parser, argv, SYSTEMS["finetune"])


def sweep(argv: Sequence[str]) -> None:
    """`newllm sweep`: trains New-LLM with every combination of some values, or continues a sweep."""
    parser = Parser(
        prog="newllm sweep", allow_abbrev=False, description="Train New-LLM with every combination of some values: "
        "--learning_rate 1e-3,2e-3 --seed 0,1,2 (between values that are lists themselves stands a semicolon).",
    )  # fmt: skip
    if processes.place_in(os.environ):
        raise InputError("sweep: its members share the devices of one process; start it in one")
    system = SYSTEMS["new-llm"]
    parser.add_argument("--config", help="configuration that is common to all: a name, or a TOML or JSON file "
                        f"(default {system.default})")  # fmt: skip
    parser.add_argument("--resume", metavar="SWEEP_DIR", help="continue a sweep instead of starting one")
    parser.add_argument("--run_root", metavar="DIR", default="runs", help="parent of its directory (default runs)")
    parser.add_argument("--at_once", type=int, metavar="N", help="most members that are trained side by side (default: "
                        "as many as fit into memory)")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print what the sweep would be, as JSON, and stop")
    add_deterministic(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, system, "values of settings (without: that of the configuration)")
    arguments = parser.parse_all(argv)
    set_up(arguments)
    from newllm_jax.newllm.grid import parse_values
    from newllm_jax.newllm.sweep import plan_sweep, sweep_newllm

    texts = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(system.config)}
    values = {name: parse_values(name, text or "") for name, text in texts.items() if text is not None}
    at_once = arguments.at_once
    if arguments.resume is not None:
        for option in ("dry_run", "config", *values):
            if getattr(arguments, option):
                raise InputError(f"{option}: does not go with --resume: a sweep goes on as it was started")
        sweep_newllm(resume=arguments.resume, at_once=at_once, stop=signals.came)
        return
    name = system.default if arguments.config is None else arguments.config
    config, run_root = load_config(name), checked_path("run_root", arguments.run_root)
    if arguments.dry_run:
        print(json.dumps(plan_sweep(config, values, at_once), indent=2))
        return
    sweep_newllm(config, values, name=f"sweep-{Path(name).stem}", run_root=run_root, at_once=at_once, stop=signals.came)


def _train(parser: Parser, argv: Sequence[str], system: System) -> None:
    """What the training commands share: start a run, continue one, or print only its plan."""
    _add_run_options(parser, system)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    overrides, run_root = typed_settings(arguments, system.config), checked_path("run_root", arguments.run_root)
    processes.connect()
    running = {"stop": signals.came, "narrate": print if processes.is_first() else _nothing}
    if arguments.resume is not None:
        for option in ("dry_run", "auto_batch"):
            if getattr(arguments, option):
                raise InputError(f"{option}: does not go with --resume")
        if arguments.config is not None:
            overrides = {**load_config(arguments.config, config_class=system.config).to_dict(), **overrides}
        call(system.train, resume=arguments.resume, overrides=overrides, **running)
        return
    name = system.default if arguments.config is None else arguments.config
    config = load_config(name, overrides, config_class=system.config)
    if arguments.auto_batch and config.micro_batch is not None:
        raise InputError("auto_batch: does not go with micro_batch, which it chooses")
    if arguments.auto_batch and getattr(config, "text", "") == "stream":
        raise InputError("auto_batch: does not go with text stream, which has no micro_batch; lower batch_size")
    told = ""
    if arguments.auto_batch:
        config, told = systems.largest_micro_batch(config)
    if arguments.dry_run:
        print(json.dumps(call(system.plan, config), indent=2))
        return
    if told:
        print(f"micro batch {told}")
    call(system.train, config, name=f"{system.prefix}{Path(name).stem}", run_root=run_root, **running)


def _nothing(line: str) -> None:
    """What a process tells that is not the first of several."""


def _add_run_options(parser: Parser, system: System) -> None:
    parser.add_argument("--config", help=f"configuration: a name, or a TOML or JSON file (default {system.default})")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue a run instead of starting one")
    parser.add_argument("--run_root", metavar="DIR", default="runs", help="parent of run directories (default runs)")
    parser.add_argument("--dry_run", action="store_true", help="print what a run would be, as JSON, and stop")
    parser.add_argument("--auto_batch", action="store_true", help="largest micro_batch that fits into free memory")
    add_deterministic(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, system, "settings (the defaults are those of the configuration)")
