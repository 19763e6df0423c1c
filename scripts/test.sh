#!/bin/sh
# Set up .venv, then run the linter, the quick tests, the slow ones and, if there is a GPU, those that need one. Arguments
# go to pytest: sh scripts/test.sh -k dice, and leave those of a GPU out, as QUICK=1 does, without the slow ones.
set -e
REQUIREMENTS=requirements-dev.txt
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread in each of several test processes
$python -m ruff check .
$python -m ruff format --check .
$python -m pytest -n auto -m "not slow" "$@"
[ -n "$QUICK" ] || $python -m pytest -n auto -m slow "$@"
if [ -z "$QUICK" ] && [ $# -eq 0 ] && $python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    ON_GPU=1 $python -m pytest tests/test_cuda.py
fi
