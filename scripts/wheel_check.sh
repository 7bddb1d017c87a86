#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and try what a stranger tries first: import, --version or --help, the files
# that come with the package, a user's mypy, and the links of the package page.
#
#   scripts/wheel_check.sh [FOLDER]       FOLDER (made when missing; default: a temporary one) gets the wheel and the environment
#   PYTHON=python3.12 scripts/wheel_check.sh
#   PIP_ARGS='-c constraints.txt' scripts/wheel_check.sh     more arguments of the installation
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
if [ -n "${1:-}" ]; then
  mkdir -p "$1"
  FOLDER=$(cd "$1" && pwd)
else
  FOLDER=$(mktemp -d)
  trap 'rm -rf "$FOLDER"' EXIT
fi
export PYTHONPATH= HF_HUB_OFFLINE=1

"$PYTHON" -m pip wheel -qq --no-deps -w "$FOLDER" .
WHEEL=$(ls -t "$FOLDER"/neat_align-*.whl | head -1)
echo "wheel: $(basename "$WHEEL"), $(du -k "$WHEEL" | cut -f1) KiB"

"$PYTHON" -m venv "$FOLDER/venv"
BIN="$FOLDER/venv/bin"
# shellcheck disable=SC2086
"$BIN/python" -m pip install -qq ${PIP_ARGS:-} "$WHEEL"
"$BIN/python" -m pip check
cd "$FOLDER" # nothing of the repository is to be found by accident

"$BIN/python" - "$WHEEL" <<'PY'
import re, sys, zipfile
from importlib.metadata import metadata, version
from importlib.resources import files

import neat_align

for name in neat_align.__all__:
    getattr(neat_align, name)
root = files("neat_align")
assert (root / "py.typed").is_file()
for folder, ending in (("cli/recipes", ".yaml"), ("prompts/banks", ".yaml"), ("demo", ".jsonl")):
    found = [f.name for f in (root / folder).iterdir() if f.name.endswith(ending)]
    assert found, f"no {ending} in {folder}"
with zipfile.ZipFile(sys.argv[1]) as archive:
    strange = [n for n in archive.namelist() if not n.startswith(("neat_align/", "neat_align-"))]
    assert not strange, strange
page = metadata("neat-align")
assert page.get_all("Project-URL"), "no project URLs"
text = page.get_payload() or page["Description"]
relative = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://|#", link)]
assert not relative, f"the package page has links that lead nowhere: {relative}"
print(f"neat-align {version('neat-align')} on Python {sys.version.split()[0]}: {len(neat_align.__all__)} public names")
PY
"$BIN/neat-align" --help >/dev/null
"$BIN/neat-align" train --help >/dev/null
# What is missing is asked for in one message, and is no traceback.
if "$BIN/neat-align" demo --output-dir "$FOLDER/demo" 2>"$FOLDER/demo.err"; then
  echo "the demo ran without its packages" >&2
  exit 1
fi
grep -q "^error: the demo needs" "$FOLDER/demo.err" || { cat "$FOLDER/demo.err" >&2; exit 1; }
grep "^error" "$FOLDER/demo.err"
echo "the wheel is good"
