#!/usr/bin/env bash
# Runs a selection of the tests: `bash scripts/test.sh` the default ones, or `slow`, `long`, `oracles`, `browser`, `all`.
# `oracles` compares with torch, transformers and peft, and lets further clients ask the API, in an environment of its
# own (.venv-oracles).
# `browser` looks at pages in Chromium, which it installs where apt-get is there and may.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
selection=${1:-default}

run_default() {
  use_environment .venv "[test,serve]"
  ruff check .
  ruff format --check .
  python -m pytest -q -n 2 --dist loadfile -m "not slow and not long and not oracles and not browser" "$@"
}

run_slow() {
  # libtpu, which compiles for TPUs that are not there, exists for Linux on x86-64 alone.
  use_environment .venv "[test,serve,plan]"
  # Of a slow sweep, the later cases are long ones too.
  python -m pytest -q -n 2 --dist loadfile -m "slow and not long" "$@"
  # The compiler for NVIDIA GPUs stays out of the environment: it writes of absent drivers to every script's errors.
  local version
  version=$(python -c 'import jaxlib; print(jaxlib.__version__)')
  [ -d ".plan-gpu/jax_cuda12_plugin-$version.dist-info" ] || python -m pip install --quiet --disable-pip-version-check \
    --upgrade --no-deps --target .plan-gpu "jax-cuda12-plugin==$version" "jax-cuda12-pjrt==$version"
  PYTHONPATH="$PWD/.plan-gpu:${PYTHONPATH:-}" python -m pytest -q -m slow tests/test_planner_gpu.py
}

run_long() {
  use_environment .venv "[test,serve,plan]"
  python -m pytest -q -n 2 --dist loadfile -m long "$@"
}

run_oracles() (
  # torch by itself first: other packages would pull a build with CUDA.
  [ -x .venv-oracles/bin/python ] || "${PYTHON:-python3}" -m venv .venv-oracles
  .venv-oracles/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
  use_environment .venv-oracles "[test,serve,oracles]"
  python -m pytest -q -n 2 --dist loadfile -m oracles "$@"
)

run_browser() {
  use_environment .venv "[test,serve,browser]"
  if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || {
      echo "error: there is no Chromium on the path; install the package chromium of your system." >&2
      exit 1
    }
    apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium >/dev/null
  fi
  python -m pytest -q -m browser "$@"
}

shift || true
case $selection in
  default) run_default "$@" ;;
  slow) run_slow "$@" ;;
  long) run_long "$@" ;;
  oracles) run_oracles "$@" ;;
  browser) run_browser "$@" ;;
  all) run_default "$@"; run_slow "$@"; run_long "$@"; run_oracles "$@"; run_browser "$@" ;;
  *) echo "error: there is no selection '$selection'; use slow, long, oracles, browser, all, or nothing for the default tests." >&2; exit 2 ;;
esac
