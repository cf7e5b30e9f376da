#!/bin/bash
# Slurm: 2 nodes of 8 GPUs, one process a node. From the checkout, which all nodes share:
#
#   sbatch docs/clusters/slurm.sh                                fine-tunes SmolLM2
#   sbatch docs/clusters/slurm.sh cascade                        trains a stage of CASCADE
#   RUN_ROOT=runs/4711 sbatch --nodes=1 docs/clusters/slurm.sh   goes on with the run of job 4711, here on one node
#
#SBATCH --job-name=newllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=newllm-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
export JAX_PLATFORMS=cuda                 # without a GPU an error, not a slow run on CPUs
RUN_ROOT=${RUN_ROOT:-runs/$SLURM_JOB_ID}  # of one run; a job that is queued again keeps its number

run=
find_run() { # a folder is a run once it has its settings
  for settings in "$RUN_ROOT"/*/config.json; do
    if [ -f "$settings" ]; then run=${settings%/config.json}; fi
  done
}

system=${1:-finetune}
options=(--time_limit 11h --save_minutes 10) # it stops by itself before Slurm ends it
if [ "$system" = finetune ]; then            # Adam's moments of all weights, divided over pairs of GPUs
  options+=(--mesh "data=$((SLURM_NNODES * SLURM_GPUS_ON_NODE / 2)),fsdp=2")
fi

find_run
if [ -n "$run" ]; then
  command=(newllm "$system" --resume "$run")
elif [ "$system" = cascade ]; then
  command=(newllm cascade --config plus --batch_size 64 --run_root "$RUN_ROOT" --fallback error)
else
  command=(newllm finetune --batch_size 64 --run_root "$RUN_ROOT" --fallback error)
fi
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "${command[@]}" "${options[@]}"

find_run
if [ ! -f "$run/report.md" ]; then # the time limit: the run is not finished, and the job goes on later
  scontrol requeue "$SLURM_JOB_ID"
fi
