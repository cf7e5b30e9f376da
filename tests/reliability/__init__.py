"""Long tests of reliability, each a command: `python -m tests.reliability.NAME` from the root of the checkout."""
