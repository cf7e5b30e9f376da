"""What runs survive, counted by commands such as `python -m tests.reliability.kills`."""
