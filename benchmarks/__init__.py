"""Speed and memory of newllm_jax, beside re-creations in PyTorch, measured in the same run.

    python -m benchmarks.newllm      updates of New-LLM; --sweep length, batch, forms, memory, plan, seeds
    python -m benchmarks.cascade     the update of a CASCADE stage, and the extraction; --sweep plan, seeds
    python -m benchmarks.startup     imports, --help, --dry_run, and the time to the first finished update
    python -m benchmarks.profile     which kernels an update consists of, and how long the GPU idles between them
    python -m benchmarks.tables      writes the tables of README.md and docs/results/README.md; --check only compares

The first four write a JSON file each and print its tables. What they measure is in `subjects`, how they measure it in
`harness`. PyTorch is optional: without it only the library itself is measured, and the file says so
(`pip install -e ".[benchmarks]"`).
"""
