#!/usr/bin/env bash
# A sweep on Slurm: one Ray cluster inside one allocation.
#
#   sbatch cluster/slurm.sh sweeps/tima_sweep.py --name imagenet-1 --num-trials 16
#
# Submit it from the root of the checkout, which all nodes share and where .venv is. The same sbatch line, or Slurm's own
# requeue after a preemption, continues the sweep.
#SBATCH --job-name=zsr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=36
#SBATCH --mem=160G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail
umask 077

cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
export PATH="$PWD/.venv/bin:$PATH" ZSR_HOME="$PWD"

# Other people share these machines, and Ray's GCS, raylet and metrics ports listen on every interface: without the token
# anybody on the cluster's network could run code as you. One token for each job, in your own files.
run=".zsr/slurm-$SLURM_JOB_ID"
mkdir -p "$run"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/$run/ray-token"
[[ -s $RAY_AUTH_TOKEN_PATH ]] || python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH"

# Own ports and temporary folder, so that two jobs may share a head's machine. Short: Ray's sockets bound the path's length.
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun no longer takes that from sbatch
port=$((20000 + SLURM_JOB_ID % 10000))
dashboard=$((30000 + SLURM_JOB_ID % 10000))
client=$((40000 + SLURM_JOB_ID % 10000))
temporary="/tmp/zsr-$SLURM_JOB_ID"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# Four CPUs of the first node stay with the driver; all others belong to trials. --block: a step lives as long as its
# raylet, and Slurm ends what a step started. `ray stop` would also end other jobs of yours on the same machines.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --node-ip-address="$address" --port="$port" --temp-dir="$temporary" \
  --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --dashboard-agent-listen-port=0 \
  --ray-client-server-port="$client" --min-worker-port=0 --max-worker-port=0 \
  --num-cpus="$((SLURM_CPUS_PER_TASK - 4))" --num-gpus="$SLURM_GPUS_PER_NODE" &
steps=($!)
for node in "${nodes[@]:1}"; do
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
    ray start --block --address="$address:$port" --temp-dir="$temporary" --dashboard-agent-listen-port=0 \
    --min-worker-port=0 --max-worker-port=0 --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_PER_NODE" &
  steps+=($!)
done

# By process id alone, the driver first: it then closes its record, and the sweep can be resumed.
driver=
end() {
  trap - TERM EXIT
  [[ -z $driver ]] || { kill -TERM "$driver" 2>/dev/null && wait "$driver"; } || true
  kill -TERM "${steps[@]}" 2>/dev/null || true
  wait || true
}
trap 'end; exit 143' TERM
trap end EXIT

export RAY_ADDRESS="$address:$port"
for _ in $(seq 60); do
  found=$(ray list nodes --address "http://127.0.0.1:$dashboard" --filter state=ALIVE --format json 2>/dev/null |
    python -c 'import json, sys; print(len(json.load(sys.stdin)))' 2>/dev/null || echo 0)
  [[ $found -ge ${#nodes[@]} ]] && break
  sleep 5
done
echo "slurm: $found of ${#nodes[@]} nodes are up, dashboard on $head, 127.0.0.1:$dashboard"

bash cluster/start_or_resume.sh "$@" &
driver=$!
code=0
wait "$driver" || code=$?
driver=
exit "$code"
