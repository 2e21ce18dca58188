#!/usr/bin/env bash
# A small instruct model from a Hugging Face folder through SFT and DPO with OGPSA on a CPU, and back: docs/laptop.md.
#   launch/laptop.sh MODEL_FOLDER --general conversations.jsonl
# Arguments go to `megatron-ogpsa laptop`; --help lists them.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # it was started with sh
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
use_one_thread_a_rank
exec "$OGPSA_VENV/bin/megatron-ogpsa" laptop "$@"
