"""The recipes for clusters, run with stand-ins for the cluster: what each process is told, and what it would train."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from newllm_jax.cli import commands, training
from newllm_jax.config import RunConfig
from newllm_jax.records.results import RunResult
from newllm_jax.systems import SYSTEMS

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs" / "clusters"
NODES, GPUS = 2, 8
PLACE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
CONFIGS = {system.command: system.config for system in SYSTEMS.values()}

# Writes its name, words and environment into a file of its own. `srun` also runs its command, once a task.
STAND_IN = """#!{python}
import json, os, pathlib, subprocess, sys
name = pathlib.Path(sys.argv[0]).name
calls = pathlib.Path(os.environ["CALLS"])
call = dict(name=name, argv=sys.argv[1:], env=dict(os.environ))
(calls / f"{{len(list(calls.iterdir())):03}}.json").write_text(json.dumps(call))
if name == "srun":
    command = sys.argv[1:]
    while command[0].startswith("--"):
        command.pop(0)
    codes = [subprocess.run(command, env=os.environ | dict(SLURM_PROCID=str(task))).returncode for task in (0, 1)]
    sys.exit(max(codes))
sys.exit(int(os.environ.get("EXIT_CODE", 0)) if name == "newllm" else 0)
"""


@pytest.fixture
def bash(tmp_path):
    """Runs a shell script in a folder of its own, with stand-ins for the commands of clusters and `newllm`.

    Returns the exit code and the calls.
    """
    stand_ins, count = tmp_path / "bin", iter(range(100))
    stand_ins.mkdir()
    for name in ("newllm", "srun", "scontrol"):
        (stand_ins / name).write_text(STAND_IN.format(python=sys.executable))
        (stand_ins / name).chmod(0o755)

    def run(words: list[str], **variables: str) -> tuple[int, list[dict[str, Any]]]:
        calls = tmp_path / f"calls-{next(count)}"
        calls.mkdir()
        environment = {"PATH": f"{stand_ins}:/usr/bin:/bin", "CALLS": str(calls), **variables}
        done = subprocess.run(["bash", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert not done.stderr, done.stderr
        return done.returncode, [json.loads(path.read_text()) for path in sorted(calls.iterdir())]

    return run


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What a `newllm` command would train, by the parser and checks of the command itself; nothing is trained.

    Until the settings have `mesh`, it is left out of the command.
    """

    def what(argv: list[str]) -> dict[str, Any]:
        words, config = list(argv), CONFIGS[argv[0]]
        if not has_mesh(config) and "--mesh" in words:
            del words[words.index("--mesh") : words.index("--mesh") + 2]
        calls = []

        def call(function: str, *values: Any, **named: Any) -> Any:
            if function in {system.next_steps for system in SYSTEMS.values()}:
                return []
            calls.append((values, named))
            return RunResult(tmp_path, {})

        monkeypatch.setattr(training, "call", call)
        commands.COMMANDS[words[0]](words[1:])
        ((values, named),) = calls
        return {"config": values[0] if values else None, **named}

    return what


def has_mesh(config: type[RunConfig]) -> bool:
    return "mesh" in {field.name for field in dataclasses.fields(config)}


def option(argv: list[str], name: str) -> str | None:
    return argv[argv.index(f"--{name}") + 1] if f"--{name}" in argv else None


def devices(mesh: str) -> int:
    """How many devices a mesh such as `data=8,fsdp=2` has."""
    data, fsdp = map(int, re.fullmatch(r"data=(\d+),fsdp=(\d+)", mesh).groups())
    return data * fsdp


def check_start(argv: list[str], trained: Any) -> None:
    """A fresh start on all devices, into a folder of runs, from sources that all processes can reach."""
    started = trained(argv)
    assert "resume" not in started and str(started["run_root"]) == option(argv, "run_root")
    assert started["config"].fallback == "error"
    assert started["config"].batch_size % (NODES * GPUS) == 0
    if mesh := option(argv, "mesh"):
        assert devices(mesh) == NODES * GPUS
        assert getattr(started["config"], "mesh", mesh) == mesh


def check_resume(argv: list[str], run: Path | str, trained: Any) -> None:
    """It goes on with the run, and changes nothing that resuming may not change."""
    resumed = trained(argv)
    assert resumed["resume"] == str(run)
    assert resumed["overrides"].keys() <= CONFIGS[argv[0]].resumable


def slurm_variables(folder: Path, **variables: str) -> dict[str, str]:
    told = {"SLURM_SUBMIT_DIR": folder, "SLURM_JOB_ID": 4711, "SLURM_NNODES": NODES, "SLURM_GPUS_ON_NODE": GPUS}
    return {name: str(value) for name, value in told.items()} | {"SLURM_CPUS_PER_TASK": "32"} | variables


def make_run(root: Path) -> Path:
    """A run that has begun, beside a folder that was never a run."""
    run = root / "finetune-published-20260102-030405"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (root / "finetune-published-20260102-000000").mkdir()
    return run


SLURM = RECIPES / "slurm.sh"


def test_slurm_asks_for_nodes_in_lines_that_sbatch_reads(trained):
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    head = SLURM.read_text().split("\nset ")[0].splitlines()  # sbatch reads up to the first command
    assert all(line.startswith("#") for line in head)
    lines = [line.removeprefix("#SBATCH --") for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(lines) == sum(line.startswith("#SBATCH --") for line in head)
    asked = dict(line.partition("=")[::2] for line in lines)
    assert {name: asked[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node", "requeue", "open-mode")} == {
        "nodes": str(NODES), "ntasks-per-node": "1", "gpus-per-node": str(GPUS), "requeue": "", "open-mode": "append",
    }  # fmt: skip
    hours, minutes, seconds = map(int, asked["time"].split(":"))
    limit = trained(["finetune", "--time_limit", re.search(r"--time_limit (\w+)", SLURM.read_text())[1]])["config"]
    assert 600 <= 3600 * hours + 60 * minutes + seconds - limit.limit_seconds <= 7200


@pytest.mark.parametrize("system", ["finetune", "cascade"])
def test_slurm_starts_a_run_and_queues_it_again_until_it_is_finished(system, bash, trained, tmp_path):
    words = [str(SLURM), *([] if system == "finetune" else [system])]
    code, (srun, first, second, requeue) = bash(words, **slurm_variables(tmp_path))
    assert (code, srun["name"], first["name"], requeue["name"]) == (0, "srun", "newllm", "scontrol")
    assert requeue["argv"] == ["requeue", "4711"]
    assert srun["argv"][:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=32"]
    assert first["argv"] == second["argv"] and first["argv"][0] == system
    check_start(first["argv"], trained)
    assert option(first["argv"], "mesh") == ("data=8,fsdp=2" if system == "finetune" else None)
    assert option(first["argv"], "run_root") == "runs/4711"

    make_run(tmp_path / "runs" / "4711")
    code, (_, first, second, requeue) = bash(words, **slurm_variables(tmp_path))
    assert (code, requeue["name"]) == (0, "scontrol")
    assert first["argv"] == second["argv"] and first["argv"][0] == system
    check_resume(first["argv"], "runs/4711/finetune-published-20260102-030405", trained)

    (tmp_path / first["argv"][2] / "report.md").write_text("finished")
    code, calls = bash(words, **slurm_variables(tmp_path))
    assert (code, [call["name"] for call in calls]) == (0, ["srun", "newllm", "newllm"])


def test_slurm_ends_where_a_process_fails(bash, tmp_path):
    code, calls = bash([str(SLURM)], **slurm_variables(tmp_path, EXIT_CODE="3"))
    assert (code, [call["name"] for call in calls]) == (3, ["srun", "newllm", "newllm"])


def test_slurm_goes_on_with_the_run_of_another_job_on_one_node(bash, trained, tmp_path):
    run = make_run(tmp_path / "elsewhere")
    variables = slurm_variables(tmp_path, RUN_ROOT=str(run.parent), SLURM_NNODES="1")
    code, (_, newllm, *_) = bash([str(SLURM)], **variables)
    assert code == 0 and devices(option(newllm["argv"], "mesh")) == GPUS
    check_resume(newllm["argv"], run, trained)


@pytest.fixture
def jobset():
    return {each["kind"]: each for each in yaml.safe_load_all((RECIPES / "jobset.yaml").read_text())}


def test_jobset_has_a_process_a_pod_that_knows_its_place(jobset):
    assert jobset.keys() == {"JobSet", "PersistentVolumeClaim"}
    claim, name, spec = jobset["PersistentVolumeClaim"], jobset["JobSet"]["metadata"]["name"], jobset["JobSet"]["spec"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (worker,) = spec["replicatedJobs"]
    job = worker["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (worker["replicas"], job["completionMode"]) == (1, "Indexed")
    variables = {variable["name"]: variable for variable in container["env"]}
    assert job["completions"] == job["parallelism"] == int(variables["JAX_NUM_PROCESSES"]["value"]) == NODES
    index = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    host, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-{worker['name']}-0-0.{spec['network']['subdomain']}"  # job 0, completion index 0
    assert spec["network"]["enableDNSHostnames"] is True
    assert [int(port)] == [opened["containerPort"] for opened in container["ports"]]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == GPUS
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] == "runs"]
    assert claims == [claim["metadata"]["name"]]


def test_jobset_starts_all_pods_again_but_not_after_bad_input(jobset):
    spec = jobset["JobSet"]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (rule,), (failure,) = spec["failurePolicy"]["rules"], job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert (failure["action"], failure["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert failure["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]


def test_jobset_starts_a_run_or_goes_on_with_it(jobset, bash, trained, tmp_path):
    (container,) = jobset["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "bash"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    check_script(container["command"][1], container["args"][0], mounted["runs"], (bash, trained, tmp_path))


def test_skypilot_starts_a_run_or_goes_on_with_it(bash, trained, tmp_path):
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (NODES, f"H100:{GPUS}")
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True).returncode == 0
    ((folder, _),) = task["volumes"].items()
    for rank in range(NODES):
        told = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": str(NODES)}
        told["SKYPILOT_NODE_IPS"] = "10.0.0.5\n10.0.0.6"
        env = check_script("-c", task["run"], folder, (bash, trained, tmp_path / str(rank)), **told)
        assert [env[name] for name in PLACE] == ["10.0.0.5:8476", str(NODES), str(rank)]


def check_script(how: str, script: str, folder: str, fixtures: Any, **variables: str) -> dict[str, str]:
    """Starts a run with the script of a pod or node, then goes on with it; returns its environment.

    Args:
      folder: where the shared folder is on a node; here it is another one.
    """
    bash, trained, here = fixtures
    root = option(shlex.split(script, comments=True), "run_root")
    assert Path(root).parent == Path(folder)  # of its own, in what all nodes share
    script = script.replace(folder, str(here))
    code, (newllm,) = bash([how, script], **variables)
    assert code == 0 and option(newllm["argv"], "run_root") == root.replace(folder, str(here))
    assert option(newllm["argv"], "mesh") == "data=8,fsdp=2"
    check_start(newllm["argv"], trained)
    run = make_run(here / Path(root).name)
    code, (newllm,) = bash([how, script], **variables)
    assert code == 0
    check_resume(newllm["argv"], run, trained)
    assert bash([how, script], EXIT_CODE="143", **variables)[0] == 143  # what the cluster sees of a signal
    return newllm["env"]


def test_commands_of_the_page_are_accepted(trained):
    page = (ROOT / "docs" / "clusters.md").read_text()
    written = re.findall(r"^newllm .+$", page, re.M) + re.findall(r"`(newllm [^`]+)`", page)
    assert len(written) == 3
    for line in written:
        argv = shlex.split(line)[1:]
        if "--resume" in argv:
            check_resume(argv, option(argv, "resume"), trained)
        else:
            check_start(argv, trained)


@pytest.mark.parametrize("name", ["slurm.sh", "jobset.yaml", "skypilot.yaml"])
def test_no_recipe_names_a_host_or_a_machine(name):
    text = (RECIPES / name).read_text()
    hosts = re.findall(r"\b[\w.-]+\.(?:com|io|org|net)/[\w-]+", text)  # but those of names in Kubernetes
    assert set(hosts) <= {"jobset.x-k8s.io/v1alpha2", "batch.kubernetes.io/job-completion-index", "nvidia.com/gpu"}
    assert not re.search(r"://|/(?:home|root|tmp|work)/|\d+\.\d+\.\d+\.\d+", text)
    assert f"[{name}](clusters/{name})" in (ROOT / "docs" / "clusters.md").read_text()
