"""What is computed over whole splits: in memory and in files, at once and as a running sum, the same bits."""

from __future__ import annotations

from functools import partial

import numpy as np

from newllm_jax.cascade import paths
from newllm_jax.cascade.paths import TrainedDesign, decision_states, hidden_moment, in_batches
from tests.cascade.conftest import SKIP


def test_the_hidden_moment_is_a_running_sum_to_the_same_bits(llama):
    chunks = np.random.default_rng(0).integers(0, 61, (19, 129)).astype(np.int32)  # more than are read at a time
    moments = in_batches(partial(paths._moments, llama.base, llama.params), llama.params, chunks)[0]
    np.testing.assert_array_equal(hidden_moment(llama.base, llama.params, chunks), moments.mean(axis=0))
    np.testing.assert_array_equal(hidden_moment(llama.base, llama.params, chunks[:0]), np.eye(16))
    assert not np.allclose(moments[0], moments.mean(axis=0))


def test_what_a_probe_reads_is_the_same_in_a_file(llama, tmp_path):
    design = llama.design(**SKIP)
    trained = TrainedDesign(design, llama.params, llama.init(design, 0.1))
    chunks = np.random.default_rng(0).integers(0, 61, (11, 129)).astype(np.int32)
    in_memory, in_file = decision_states(trained, chunks), decision_states(trained, chunks, tmp_path)
    assert isinstance(in_file, np.memmap) and in_file.shape == (11 * 128, 16)
    np.testing.assert_array_equal(in_file, in_memory)
