# Sourced by the other scripts: makes .venv and installs the requirements named in $REQUIREMENTS, once for each change.
# PYTHON names the interpreter to start from (3.11 or newer). Versions are those of requirements-lock.txt, and archives
# that it knows are verified (tools/lock.py); LOCK= (empty) lets pip choose what the requirement files leave open.
cd "$(dirname "$0")/.." || exit 1
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
LOCK=${LOCK-requirements-lock.txt}
[ -f "$LOCK" ] || LOCK=
stamp=.venv/installed-$(basename "$REQUIREMENTS")
if [ ! -x .venv/bin/python ]; then
    echo "making the virtual environment .venv"
    "${PYTHON:-python3}" -m venv .venv || exit 1
fi
if ! cat requirements.txt "$REQUIREMENTS" $LOCK | cmp -s - "$stamp"; then
    echo "installing $REQUIREMENTS into .venv: PyTorch, MONAI and what they need, some minutes the first time;"
    echo "  about 1.5 GB on the disk with a PyTorch for CPUs, several more with one for GPUs"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${LOCK:+-c "$LOCK"} -r "$REQUIREMENTS" \
        --report .venv/installed.json || exit 1
    if [ -n "$LOCK" ] && ! .venv/bin/python tools/lock.py --verify .venv/installed.json; then
        touch .venv/refused  # what pip has installed already it does not report again
    fi
    [ -e .venv/refused ] || cat requirements.txt "$REQUIREMENTS" $LOCK > "$stamp"
fi
if [ -e .venv/refused ]; then
    echo "error: .venv holds an archive that requirements-lock.txt does not know as it is; remove .venv" >&2
    exit 1
fi
python=.venv/bin/python
