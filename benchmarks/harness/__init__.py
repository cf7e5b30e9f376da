"""How it is measured: the command line, the worker processes, timing, memory, the machine, counted work, sweeps."""
