#!/usr/bin/env bash
# One training over several machines under SLURM, a process for each GPU. When its time is up, or the queue wants
# the machines back, it saves and stops; the job is queued again and goes on where it was.
#
#   sbatch --nodes=2 examples/slurm.sh NAME --path-to-data FOLDER [any option of tvit train]
#
#SBATCH --job-name=tvit
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# --ntasks-per-node is the number of GPUs; --signal gives the step that is running, and its checkpoint, two minutes.

set -u
name=${1:?"sbatch examples/slurm.sh NAME [options of tvit train]"}
shift

# The processes meet at the first machine of the job, on a port that another job is unlikely to have.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8} # which srun does not take from the job by itself
export TVIT_NUM_WORKERS=${TVIT_NUM_WORKERS:-$((SRUN_CPUS_PER_TASK - 1))}

# A named run that is not finished is gone on with. srun hands signals on, and ends with the highest exit code of its
# processes; torchrun would turn 75 into 1.
srun --wait=120 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec tvit train "$@"' \
    tvit --experiment-name "$name" "$@" &
step=$!
trap 'kill -USR1 "$step"' USR1
wait "$step"
code=$?
while kill -0 "$step" 2> /dev/null; do # a signal ends `wait` before the step has ended
    wait "$step"
    code=$?
done

if [ "$code" -eq 75 ]; then # saved after SIGUSR1
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
