"""A recurrent cell of one's own, a running mean with a gate, trained by the library's updates on text of Python's help.

A minute on two CPU cores: `python docs/examples/own_cell.py`
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import newllm_jax
from newllm_jax.training.loop import evaluate
from newllm_jax.training.losses import summed_losses
from newllm_jax.training.step import Totals, init_state, make_evaluation, make_updates, train_step


class RunningMean(nn.Module):
    """A language model: `ids [B, T]` -> logits `[B, T, vocabulary]` of the word after each."""

    vocabulary: int
    width: int = 128

    @nn.compact
    def __call__(self, ids):
        words = nn.Embed(self.vocabulary, self.width)(ids)
        keep = nn.sigmoid(nn.Dense(self.width, bias_init=nn.initializers.ones)(words))

        def step(state, inputs):
            word, keep = inputs
            state = keep * state + (1 - keep) * word
            return state, state

        start = jnp.zeros_like(words[:, 0])
        _, states = jax.lax.scan(step, start, (words.swapaxes(0, 1), keep.swapaxes(0, 1)))
        return nn.Dense(self.vocabulary)(states.swapaxes(0, 1))


def main(epochs: int = 3, **settings) -> float:
    config = newllm_jax.load_config("quickstart", settings)
    data = newllm_jax.load_wikitext(config)
    model, optimizer = RunningMean(len(data.tokenizer)), optax.adam(3e-3)

    def loss(params, ids, present, key, carry, part=None):
        counted = (ids[:, 1:] != 0) & present[:, None]  # 0 pads; absent examples fill up the last batch
        return summed_losses(model.apply({"params": params}, ids[:, :-1]), ids[:, 1:], counted), carry

    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 2), jnp.int32))["params"]
    state, train = init_state(params, optimizer), data.split("train", config)
    updates, evaluation = make_updates(lambda *of_batch: train_step(loss, optimizer, *of_batch)), make_evaluation(loss)
    for epoch in range(1, epochs + 1):
        order = train.shuffled(config.batch_size, config.seed, epoch)
        state, _ = updates(state, Totals.zero(), train.data, order, 0, len(order), jax.random.key(epoch))
        found = evaluate(evaluation, state.params, data.split("validation", config), config.batch_size)
        print(f"epoch {epoch}  validation PPL {found['ppl']:.2f}  accuracy {found['accuracy']:.1%}")
    return found["ppl"]


if __name__ == "__main__":
    main()
