"""`python -m newllm_jax COMMAND`, the same as `newllm COMMAND`."""

import sys

from newllm_jax.cli.process import main

sys.exit(main())
