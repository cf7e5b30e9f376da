"""New-LLM: the context-vector language model."""
