"""What a clipping schedule does: the same small New-LLM with gradients clipped at one bound, and at rising bounds.

`clip_norms` are the bounds of the gradient's norm, `clip_epochs` the epochs (from 0) at which the next one begins.
Adam divides by the gradient's own size, so a bound matters where it cuts some updates and not others. About a minute
on two CPU cores:

    python docs/examples/clipping_schedule.py
"""

import newllm_jax

SCHEDULES = {
    "one bound": {"clip_norms": [1.0], "clip_epochs": []},
    "rising bounds": {"clip_norms": [0.1, 0.5, 2.0], "clip_epochs": [1, 2]},
}


def main(run_root: str = "runs", **settings) -> dict[str, list[dict]]:
    histories = {}
    for name, schedule in SCHEDULES.items():
        config = newllm_jax.load_config("quickstart", {"num_epochs": 3, **settings, **schedule})
        result = newllm_jax.train_newllm(config, name="clipping", run_root=run_root, narrate=lambda line: None)
        histories[name] = result.results["epochs"]
        print(name)
        for entry in histories[name]:
            norms = f"mean gradient norm {entry['grad_norm']:.2f}, clipped at {entry['clip_norm']:.1f}"
            print(f"  epoch {entry['epoch']}  validation PPL {entry['val_ppl']:.2f}  {norms}")
    return histories


if __name__ == "__main__":
    main()
