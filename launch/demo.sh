#!/usr/bin/env bash
# The demo, from nothing: installs what is missing, then fine-tunes a small model for safety with and without OGPSA.
# Arguments go to `megatron-ogpsa demo`; --help lists them.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # it was started with sh
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
use_one_thread_a_rank
exec "$OGPSA_VENV/bin/megatron-ogpsa" demo "$@"
