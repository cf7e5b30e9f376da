"""The command line: the process, the commands, compiled programs."""
