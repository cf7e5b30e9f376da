"""newllm_jax: New-LLM and CASCADE in JAX."""

__version__ = "0.1.0"
