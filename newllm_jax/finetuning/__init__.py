"""Fine-tuning of a whole SmolLM2: the control experiment of CASCADE."""
