#!/usr/bin/env bash
# Training on many nodes: start it on each, with the same arguments, which go to `megatron-ogpsa train` as in train.sh.
#
# Reads   NNODES       nodes of the run: a number, or MIN:MAX
#         MASTER_ADDR  host name of node 0, where the nodes meet
#         MASTER_PORT  a port that is free there (29500)
#         NODE_RANK    number of this node; without it, node 0 is the one whose host name MASTER_ADDR is
# Under srun nothing has to be set: SLURM says all of it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # it was started with sh
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
export MEGATRON_OGPSA_MANY_NODES=1 # the command, which reads the file, refuses where nothing says how many
exec "$OGPSA_VENV/bin/megatron-ogpsa" train "$@"
