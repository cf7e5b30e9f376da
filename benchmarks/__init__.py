"""Speed and memory of newllm_jax, beside re-creations in PyTorch, measured in the same run.

    python -m benchmarks.newllm      updates of New-LLM; --sweep length, batch, forms, phases, memory, plan, seeds
    python -m benchmarks.cascade     the update of a CASCADE stage, and the extraction; --sweep plan, seeds
    python -m benchmarks.startup     imports, --help, --dry_run, and the time to the first finished update
    python -m benchmarks.profile     which kernels an update consists of, and how long the GPU idles between them
    python -m benchmarks.generation  text of SmolLM2 and CASCADE, beside transformers
    python -m benchmarks.clusters    a phase of the time loop in thread-block clusters
    python -m benchmarks.t4          kernels and bytes of updates compiled for a T4 that is not there
    python -m benchmarks.tables      writes the tables of README.md and docs/results/README.md; --check only compares

All but the last write a JSON file each and print its tables. What they measure is in `subjects`, how they measure it in
`harness`. PyTorch is optional: without it only the library itself is measured, and the file says so
(`pip install -e ".[benchmarks]"`).
"""
