"""Markdown tables of JSON files: those that the benchmarks print, those of README.md and docs/results/README.md."""
