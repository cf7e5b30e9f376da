"""What is measured: the library (`jax_*`), re-creations in PyTorch (`torch_*`), whole runs; each in its own process."""
