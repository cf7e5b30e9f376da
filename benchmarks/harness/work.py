"""What an update must do, counted by hand: floating-point operations and bytes through device memory.

Operations are those of the matrix products (a multiply and an add are two); the backward pass makes two products for
each of the forward pass. Bytes are the fewest that a forward pass, a backward pass and an optimiser one after the other
can move: float32, every weight read by both passes, its gradient written and read, Adam's two moments and the weight
read and written (ten passes; clipping by the global norm reads the gradients once more), and what a product or the loss
reads written once and read once by each pass. Weights read again at every time step are taken to stay in the cache. A
stage whose optimiser forms the gradients itself moves fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from newllm_jax.config import NewLLMConfig
from newllm_jax.smollm.llama_config import LlamaConfig

FLOAT = 4  # bytes
PASSES = 10  # of a weight through memory in an update: forward, backward, gradient 2, Adam 6
UNREACHED_PASSES = 6  # of a weight without a gradient, which Adam still reads and writes


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes."""

    flops: float
    bytes: float


def newllm_update(config: NewLLMConfig, vocabulary: int) -> Work:
    """One update of New-LLM: all steps of a batch, forward and backward, clipping, Adam."""
    embed, hidden, context = config.embed_dim, config.hidden_dim, config.context_dim
    repeated = hidden * (context + (config.num_layers - 1) * hidden + 3 * context + vocabulary)
    kernels = repeated + hidden * embed
    biases = config.num_layers * hidden + 3 * context + vocabulary
    weights = kernels + biases + 2 * context + vocabulary * embed
    positions = config.batch_size * (config.sequence_length - 1)
    activations = positions * (embed + hidden + config.num_layers * hidden + 4 * context + vocabulary)
    words = min(positions, vocabulary)  # a word's part of the first layer is the same in all its places
    return Work(
        flops=3 * 2 * (positions * repeated + words * hidden * embed),
        bytes=FLOAT * ((PASSES + 1) * weights + 3 * activations),
    )


def block_kernels(llama: LlamaConfig) -> tuple[int, int]:
    """Of a Llama block: the query and key projections, and all its other kernels."""
    heads, kv_heads = llama.num_heads * llama.head_dim, llama.num_kv_heads * llama.head_dim
    query_key = llama.hidden_size * (heads + kv_heads)
    return query_key, llama.hidden_size * (kv_heads + heads + 3 * llama.intermediate_size)


def stage_update(llama: LlamaConfig, batch: int) -> Work:
    """One update of a CASCADE stage on `batch` single tokens, AdamW included.

    Attention over one key is that key's value, so queries and keys need no product; only weight decay touches them.
    """
    query_key, others = block_kernels(llama)
    head = llama.vocab_size * llama.hidden_size
    reached = llama.num_layers * (others + 2 * llama.hidden_size) + llama.hidden_size + head
    unreached = llama.num_layers * query_key
    block = 4 * llama.hidden_size + 2 * llama.num_kv_heads * llama.head_dim + 3 * llama.intermediate_size
    activations = batch * (llama.num_layers * block + llama.hidden_size + llama.vocab_size)
    return Work(
        flops=3 * 2 * batch * (llama.num_layers * others + head),
        bytes=FLOAT * (PASSES * reached + UNREACHED_PASSES * unreached + 3 * activations),
    )


def extraction(llama: LlamaConfig, chunks: int, length: int, batch: int) -> Work:
    """One pass of the frozen base over chunks of `length` tokens: the weights are read once a batch of chunks."""
    query_key, others = block_kernels(llama)
    head = llama.vocab_size * llama.hidden_size
    tokens = chunks * length
    attention = 2 * length * llama.num_heads * llama.head_dim  # scores and mix, masked ones computed too
    kernels = llama.num_layers * (query_key + others)
    activations = tokens * (llama.num_layers * (6 * llama.hidden_size + 3 * llama.intermediate_size) + llama.vocab_size)
    return Work(
        flops=2 * tokens * (kernels + head + llama.num_layers * attention),
        bytes=FLOAT * (-(-chunks // batch) * (kernels + head) + 2 * activations),
    )
