# Sourced by the other scripts: makes .venv and installs the requirements named in $REQUIREMENTS, once for each change.
# PYTHON names the interpreter to start from (3.11 or newer).
cd "$(dirname "$0")/.." || exit 1
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
stamp=.venv/installed-$(basename "$REQUIREMENTS")
if [ ! -x .venv/bin/python ]; then
    echo "making the virtual environment .venv"
    "${PYTHON:-python3}" -m venv .venv || exit 1
fi
if ! cat requirements.txt "$REQUIREMENTS" | cmp -s - "$stamp"; then
    echo "installing $REQUIREMENTS into .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$REQUIREMENTS" || exit 1
    cat requirements.txt "$REQUIREMENTS" > "$stamp"
fi
python=.venv/bin/python
