"""A CASCADE ensemble measured on a text of one's own: base, base with one stage, and so on, over all its tokens.

For a run of the published design (`python cascade.py --config quickstart_published` makes a small one). Half a minute
for a page of text on two CPU cores:

    python docs/examples/own_text.py runs/cascade-... page.txt
"""

import sys
from pathlib import Path

import jax
import numpy as np

import newllm_jax

CHUNK = 128  # tokens that the base reads at a time, as in training


def main(run_dir: str, file: str) -> list[dict]:
    run = newllm_jax.restore(run_dir)
    if not isinstance(run, newllm_jax.CascadeRun):
        raise SystemExit(f"{run_dir}: is not a run of the published design; `newllm evaluate` measures others")
    ids = run.tokenizer.encode(Path(file).read_text(encoding="utf-8"))
    starts = range(0, len(ids) - CHUNK, CHUNK)
    if not starts:
        raise SystemExit(f"{file}: has {len(ids)} tokens; at least {CHUNK + 1} are needed")
    chunks = np.array([ids[start : start + CHUNK + 1] for start in starts], np.int32)
    tokens = newllm_jax.extract(run.base.model, jax.device_put(run.base.params), chunks, run.config.criterion)
    size = sum(leaf.size for leaf in jax.tree.leaves(run.base.params))
    rows = newllm_jax.evaluate_ensemble(tokens, run.stage, run.stages, run.config.criterion, size)
    for row in rows:
        exits = " ".join(f"{rate:.0%}" for rate in row["exit_rates"])
        print(f"Base+{row['stages']}  PPL {row['val_ppl']:9.2f}  accuracy {row['val_accuracy']:.1%}  exits {exits}")
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
