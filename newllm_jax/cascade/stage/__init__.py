"""One stage of CASCADE: model, updates, training."""
