#!/usr/bin/env bash
# Stands in for a Python interpreter in the tests of the launch scripts. It answers questions about the version with
# FAKE_VERSION (default 3.12) and FAKE_BUILD (default 0 (fake)), makes "environments" that hold copies of itself, and pretends to be pip and pytest.
# What pip is asked to install goes to FAKE_PIP_LOG, one line each; FAKE_PIP_SECONDS and FAKE_PIP_STATUS tell it how to end.
set -euo pipefail
version="${FAKE_VERSION:-3.12}"
case "$1 ${2:-}" in
    "-V "*) echo "Python $version.0" ;;
    "-c "*"ensurepip"*)
        [[ "$version" == 3.1[234] ]] || exit 3
        [[ -z "${FAKE_WITHOUT_VENV:-}" ]] || exit 4
        ;;
    "-c "*"sys.version)"*) echo "$version.${FAKE_BUILD:-0 (fake)}" ;;
    "-c "*"sys.implementation.cache_tag)"*) echo "cpython-${version/./}" ;;
    "-c "*) exit 1 ;;
    "-m venv")
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        printf '#!/usr/bin/env bash\nprintf "ran megatron-ogpsa"\nprintf " <%%s>" "$@"\n' >"$3/bin/megatron-ogpsa"
        chmod +x "$3/bin/megatron-ogpsa"
        touch "$3/pyvenv.cfg"
        ;;
    "-m pip")
        [[ "$3" != --version ]] || exit 0
        echo "started ${*: -1}" >>"$FAKE_PIP_LOG"
        echo "Collecting torch"
        echo "  Downloading torch-2.15.0-cp312-manylinux.whl (712.3 MB)"
        sleep "${FAKE_PIP_SECONDS:-0}"
        echo "ERROR: the last words of pip"
        [[ "${FAKE_PIP_STATUS:-0}" == 0 ]] || exit "$FAKE_PIP_STATUS"
        echo "finished ${*: -1}" >>"$FAKE_PIP_LOG"
        ;;
    "-m pytest")
        printf 'ran pytest in %s' "$PWD"
        printf ' <%s>' "$@"
        exit "${FAKE_PYTEST_STATUS:-0}"
        ;;
    *) exit 64 ;;
esac
