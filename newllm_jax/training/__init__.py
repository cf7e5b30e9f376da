"""What both systems share to train: it knows no model and no data set."""
