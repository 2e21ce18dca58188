#!/usr/bin/env bash
# The tests, from nothing: installs what is missing, then runs all tests that this machine can run.
# Arguments go to pytest, with paths as seen from the project's folder: launch/test.sh tests/core -k parity
# Two processes of pytest share the files, since ranks that wait for each other leave a core idle; -n 0 has them in one.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # it was started with sh
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
use_one_thread_a_rank
cd "$OGPSA_ROOT"
exec "$OGPSA_VENV/bin/python" -m pytest -q -n 2 --dist loadfile --durations=10 "$@"
