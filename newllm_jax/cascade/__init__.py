"""CASCADE: stages of fresh layers for the hard tokens of a frozen SmolLM2."""
