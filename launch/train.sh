#!/usr/bin/env bash
# Training on this node, from nothing: installs what is missing, then starts the ranks.
# Arguments go to `megatron-ogpsa train`; --help lists them:
#   launch/train.sh CONFIG.yaml [--nproc-per-node 8] [--max-restarts 3] [--flag value ...]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # it was started with sh
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
exec "$OGPSA_VENV/bin/megatron-ogpsa" train --nnodes 1 "$@"
