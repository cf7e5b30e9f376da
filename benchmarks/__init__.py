"""Speed and memory of newllm_jax, beside re-creations in PyTorch, measured in the same run.

    python -m benchmarks.newllm      updates of New-LLM; --sweep length, batch, memory, plan
    python -m benchmarks.cascade     the update of a CASCADE stage, and the extraction; --sweep plan
    python -m benchmarks.startup     imports, --help, --dry_run, and the time to the first finished update
    python -m benchmarks.profile     which kernels an update consists of, and how long the GPU idles between them

Each writes a JSON file, from which `docs/make_tables.py` makes tables, and prints the tables. PyTorch is optional:
without it only the library itself is measured, and the file says so (`pip install -e ".[benchmarks]"`).
"""
