"""What a run leaves on disk and on the screen while it runs; knows no model."""
