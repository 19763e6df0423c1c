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
    echo "installing $REQUIREMENTS into .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${LOCK:+-c "$LOCK"} -r "$REQUIREMENTS" \
        --report .venv/installed.json || exit 1
    [ -z "$LOCK" ] || .venv/bin/python tools/lock.py --verify .venv/installed.json || exit 1
    cat requirements.txt "$REQUIREMENTS" $LOCK > "$stamp"
fi
python=.venv/bin/python
