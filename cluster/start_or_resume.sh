#!/usr/bin/env bash
# Go on with the sweep of this name, or start it if there is none: for whatever starts the same command again after a loss
# (a RayJob's next attempt, a requeued Slurm job).
#
#   cluster/start_or_resume.sh sweeps/tima_sweep.py --name imagenet-1 [arguments of the sweep]
set -euo pipefail

if [[ $# -lt 1 || ! -f $1 ]]; then
  echo "usage: $0 SWEEP.py [arguments]; '${1:-}' is not a file" >&2
  exit 2
fi

# The dry run reads storage and touches nothing. It ends with 2 if there is nothing to resume, and also after a mistake in the
# arguments, which the start below then reports. Anything else, such as storage that does not answer, must not start a second
# sweep beside the first. exec: a signal reaches the sweep itself, once.
code=0
python "$@" --resume --dry-run >&2 || code=$?
case $code in
  0) exec python "$@" --resume ;;
  2) echo "start_or_resume: starting anew" >&2 && exec python "$@" ;;
  *) exit "$code" ;;
esac
