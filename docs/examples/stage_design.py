"""A stage of one's own design: hard tokens enter the base again at a layer, whose copy there learns by LoRA.

`entry_layer` is where, `rank` how much can be learned, `criterion` what is hard, `hard_ratio` how many tokens go on.
A few minutes on two CPU cores, with the real SmolLM2-135M:

    python docs/examples/stage_design.py
"""

import newllm_jax


def main(entry_layer: int = 26, rank: int = 8, run_root: str = "runs", **settings) -> list[dict]:
    design = {"entry_layer": entry_layer, "rank": rank, "criterion": "entropy", "hard_ratio": 0.4, "num_epochs": 1}
    config = newllm_jax.load_config("quickstart", {**design, **settings}, config_class=newllm_jax.CascadeConfig)
    result = newllm_jax.train_cascade(config, name="design", run_root=run_root, narrate=lambda line: None)
    rows = result.results["ensemble"]
    for row in rows:
        name = "base alone" if row["stages"] == 0 else "with the stage"
        exits = " ".join(f"{rate:.0%}" for rate in row["exit_rates"])
        print(f"{name:14}  validation PPL {row['val_ppl']:.2f}  exits {exits}  {row['parameters']:,} parameters")
    return rows


if __name__ == "__main__":
    main()
