"""Completion, by the shells themselves."""

import shutil
import subprocess
import sys

import pytest

ASK = """
eval "$1"
COMP_WORDS=("${@:2}"); COMP_CWORD=$(($# - 2)); COMP_LINE="${*:2}"; COMP_POINT=${#COMP_LINE}
$(complete -p newllm | sed 's/.*-F \\([^ ]*\\).*/\\1/') newllm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script():
    """The script for a shell."""

    def printed(shell: str) -> str:
        code = "import sys; from newllm_jax.cli.process import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "completion", shell], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return printed


@pytest.fixture(scope="module")
def completed(script):
    """What bash offers for the last of some words."""
    found = script("bash")

    def offers(*words: str) -> list[str]:
        done = subprocess.run(["bash", "-c", ASK, "bash", found, *words], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return offers


def test_bash_completes_commands_options_configurations_and_values(completed):
    assert completed("newllm", "comp") == ["compare", "completion"]
    assert completed("newllm", "train", "--num_e") == ["--num_epochs"]
    assert completed("newllm", "train", "--config", "adv") == ["advanced", "advanced_plus"]
    assert completed("newllm", "cascade", "--config", "plus") == ["plus"]
    assert completed("newllm", "train", "--cell", "") == ["plain", "residual"]
    assert completed("newllm", "finetune", "--adapter", "l") == ["lora"]
    assert completed("newllm", "sweep", "--tie_embeddings", "") == ["true", "false"]
    assert completed("newllm", "evaluate", "--log_format", "") == ["text", "json"]


def test_bash_completes_run_directories(completed, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert completed("newllm", "generate", "") == ["runs"]


@pytest.mark.parametrize("shell, check", [("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])])
def test_other_shells_read_their_script(script, tmp_path, shell, check):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    file = tmp_path / "script"
    file.write_text(script(shell))
    done = subprocess.run([*check, file], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--config" in file.read_text() or "-l config" in file.read_text()
