"""Fine-tuning of a SmolLM2, whole or in part: the control experiments of CASCADE."""
