"""SmolLM2, and any Llama of its family: what CASCADE and fine-tuning share."""
