"""What both systems share: optimiser, update loop, early stopping, checkpoints, precision. Knows no model and no data set."""
