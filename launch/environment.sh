# Sourced by the scripts beside it: finds a Python, makes the virtual environment, installs the project.
#
# Reads   OGPSA_PYTHON  the Python to build the environment with, in place of the search
#         OGPSA_VENV    where the environment is or shall be, in place of .venv beside setup.cfg
# Sets    OGPSA_ROOT    the project's folder
#         OGPSA_VENV    absolute
# pip runs with the user's own settings (index, proxy, cache).
# shellcheck shell=bash

OGPSA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OGPSA_VENV="${OGPSA_VENV:-$OGPSA_ROOT/.venv}"
[[ "$OGPSA_VENV" == /* ]] || OGPSA_VENV="$PWD/$OGPSA_VENV"

readonly OGPSA_NEEDED_KIB=$((8 * 1024 * 1024)) # 6 GB installed, and the wheels while they are unpacked
readonly OGPSA_PROGRESS_SECONDS=15

say() { printf 'megatron-ogpsa: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 2
}

# Prints what is wrong with a Python, or nothing if the environment can be built with it. Runs it, because a name on
# PATH may be a version manager's shim that has nothing behind it.
python_problem() {
    local status=0
    "$1" -c '
import sys
if not (3, 12) <= sys.version_info[:2] < (3, 15): sys.exit(3)
try: import venv, ensurepip
except ImportError: sys.exit(4)
' >/dev/null 2>&1 </dev/null || status=$?
    case "$status" in
        0) ;;
        3) echo "is $("$1" -V 2>&1), not 3.12 to 3.14" ;;
        4) echo "has no venv module (on Debian and Ubuntu: sudo apt-get install python3-venv)" ;;
        *) echo "does not run" ;;
    esac
}

# Every Python that may be on this machine, one a line, the versions that are tested most first.
python_candidates() {
    type -aP python3.12 python3.13 python3.14 python3 python || true
    local versions="${PYENV_ROOT:-${HOME:-/}/.pyenv}/versions" minor
    for minor in 12 13 14; do
        compgen -G "$versions/3.$minor*/bin/python" || true
    done
}

# Prints the Python to build the environment with.
find_python() {
    local python problem near=""
    if [[ -n "${OGPSA_PYTHON:-}" ]]; then
        problem="$(python_problem "$OGPSA_PYTHON")"
        [[ -z "$problem" ]] || fail "OGPSA_PYTHON=$OGPSA_PYTHON $problem"
        echo "$OGPSA_PYTHON"
        return
    fi
    while IFS= read -r python; do
        problem="$(python_problem "$python")"
        if [[ -z "$problem" ]]; then
            echo "$python"
            return
        elif [[ "$problem" == *venv* && -z "$near" ]]; then
            near="$python $problem"
        fi
    done < <(python_candidates)
    [[ -z "$near" ]] || fail "$near"
    fail "no Python 3.12, 3.13 or 3.14 found: install one (sudo apt-get install python3.12 python3.12-venv," \
        "brew install python@3.12, or pyenv install 3.12), or name it with OGPSA_PYTHON=/path/to/python3.12"
}

# Prints all that an installation depends on. The stamp in the environment holds the same text once it is complete.
# Of Python that is the minor version: nodes that share the environment may have different builds of it.
wanted_stamp() {
    local python
    python="$("$OGPSA_VENV/bin/python" -c 'import sys; print(sys.implementation.cache_tag)')"
    printf '%s\n' "project: $OGPSA_ROOT" "python: $python"
    cat "$OGPSA_ROOT/setup.cfg" "$OGPSA_ROOT/pyproject.toml"
}

# An installation with an extra serves the scripts without one too, so there is a stamp for each.
stamp_file() { echo "$OGPSA_VENV/.installed-${1:-base}"; }

is_installed() {
    local stamp
    stamp="$(stamp_file "$1")"
    [[ -x "$OGPSA_VENV/bin/python" && -f "$stamp" ]] || return 1
    [[ "$(wanted_stamp 2>/dev/null)" == "$(<"$stamp")" ]]
}

# What takes the time and the space is there already.
has_torch() { compgen -G "$OGPSA_VENV/lib/python3*/site-packages/torch/version.py" >/dev/null; }

require_disk_space() {
    local parent="$OGPSA_VENV" free used=0
    if [[ -d "$OGPSA_VENV" ]]; then # an installation that was interrupted has part of it already
        used="$(du -sk "$OGPSA_VENV" | cut -f1)"
    fi
    while [[ ! -d "$parent" ]]; do parent="$(dirname "$parent")"; done
    free="$(df -Pk "$parent" | awk 'NR == 2 { print $4 }')"
    if ((free + used < OGPSA_NEEDED_KIB)); then
        fail "the installation needs 8 GB, and $parent has $(((free + used) / 1024 / 1024)) GB:" \
            "free some, or put the environment elsewhere with OGPSA_VENV=/path/to/folder"
    fi
}

make_virtual_environment() {
    local python problem
    if [[ -x "$OGPSA_VENV/bin/python" ]]; then
        problem="$(python_problem "$OGPSA_VENV/bin/python")"
        [[ -z "$problem" ]] || fail "the Python in $OGPSA_VENV $problem: remove that folder, or set OGPSA_VENV to another"
        "$OGPSA_VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    elif [[ -d "$OGPSA_VENV" && ! -f "$OGPSA_VENV/pyvenv.cfg" && -n "$(ls -A "$OGPSA_VENV")" ]]; then
        fail "$OGPSA_VENV is not empty and not a Python environment: set OGPSA_VENV to another folder"
    fi
    python="$(find_python)"
    say "making $OGPSA_VENV with $("$python" -V 2>&1) ($python)"
    "$python" -m venv "$OGPSA_VENV" || fail "$python -m venv failed: remove $OGPSA_VENV and try again"
}

# Copies what pip says to the log $1; prints the large steps of it, and a sign of life in between.
show_progress() {
    local line status
    while true; do
        status=0
        IFS= read -r -t "$OGPSA_PROGRESS_SECONDS" line || status=$?
        if ((status > 128)); then
            say "  ${SECONDS} s, still at it"
        elif ((status > 0)); then
            break
        else
            printf '%s\n' "$line" >>"$1"
            case "$line" in
                *Downloading*' MB)' | *Downloading*' GB)') say "  ${SECONDS} s  ${line#"${line%%[![:space:]]*}"}" ;;
                'Installing collected packages'*) say "  ${SECONDS} s  unpacking" ;;
            esac
        fi
    done
    cat >>"$1" # bash 3 does not tell a timeout from the end
}

install_project() {
    local extras="$1" log="$OGPSA_VENV/install.log" target="$OGPSA_ROOT"
    [[ -z "$extras" ]] || target="${target}[$extras]"
    rm -f "$OGPSA_VENV"/.installed-*
    SECONDS=0
    : >"$log"
    if ! "$OGPSA_VENV/bin/python" -m pip install --progress-bar off -e "$target" 2>&1 </dev/null | show_progress "$log"; then
        tail -n 20 "$log" >&2
        fail "pip failed; all that it said is in $log"
    fi
    local name
    for name in "" "$extras"; do
        wanted_stamp >"$log.stamp"
        mv "$log.stamp" "$(stamp_file "$name")"
    done
    say "installed in $SECONDS s"
}

hint_gpu_extra() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU' || return 0
    "$OGPSA_VENV/bin/python" -c 'import transformer_engine' >/dev/null 2>&1 ||
        say "there is an NVIDIA GPU: for FP8, fused kernels and context parallelism, install" \
            "'$OGPSA_VENV/bin/pip' install -e '${OGPSA_ROOT}[gpu]'"
}

# Takes the lock that keeps two scripts from installing at once. Where there is no flock, they must not be started so.
lock_installation() {
    mkdir -p "$(dirname "$OGPSA_VENV")"
    exec 9>"$OGPSA_VENV.lock"
    command -v flock >/dev/null || return 0
    flock -n 9 || {
        say "waiting for another installation into $OGPSA_VENV"
        flock 9
    }
}

# prepare_environment EXTRAS: leaves a complete environment in OGPSA_VENV and puts it first on PATH.
prepare_environment() {
    if ! is_installed "$1"; then
        lock_installation
        if ! is_installed "$1"; then
            if has_torch; then
                make_virtual_environment
                say "updating the installation in $OGPSA_VENV"
            else
                require_disk_space
                make_virtual_environment
                say "installing the project with PyTorch and Megatron-Core: about 4 minutes and 6 GB, the first time only"
            fi
            install_project "$1"
            hint_gpu_extra
        fi
        exec 9>&-
    fi
    export VIRTUAL_ENV="$OGPSA_VENV" PATH="$OGPSA_VENV/bin:$PATH"
}

# For scripts that run models on a CPU, with a process for each rank: more threads in each only make them wait for one another.
use_one_thread_a_rank() { export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; }
