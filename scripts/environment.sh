# Sourced by the other shell scripts: an active virtual environment, or .venv made where there is none.
# use_environment FOLDER EXTRAS installs jaxcost with the extras, such as [test], into it.

use_environment() {
  local folder=$1 extras=$2
  if [ -z "${VIRTUAL_ENV:-}" ] || [ "$folder" != .venv ]; then
    [ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
    # shellcheck disable=SC1091
    . "$folder/bin/activate"
  fi
  python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: jaxcost needs Python 3.11 or newer, and this is $(python --version); set PYTHON=python3.11." >&2
    exit 1
  }
  python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
}
