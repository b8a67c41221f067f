#!/usr/bin/env bash
# The whole loop on this machine: trains a small transformer on real text, cuts it in several ways, writes the report.
# Arguments go to scripts/study.py: bash scripts/quickstart.sh --workdir runs/mine --training.steps 200
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
use_environment .venv ""
exec python scripts/study.py configs/quickstart.py --workdir runs/quickstart "$@"
