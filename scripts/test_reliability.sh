#!/bin/sh
# The whole reliability suite (docs/reliability.md). KILLS: how often each training is killed. Arguments go to pytest.
set -e
REQUIREMENTS=requirements-dev.txt
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread in each of several test processes
export RELIABILITY=full KILLS="${KILLS:-20}"
$python -m pytest -n auto tests/reliability "$@"
