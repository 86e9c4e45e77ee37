#!/usr/bin/env bash
# Makes .venv with everything in it; `make setup` calls it, and so does any target whose .venv is missing or older than
# pyproject.toml, setup.py or constraints.txt. PYTHON names another interpreter than those on the PATH.
#
# .venv/.installing holds the number of the process at work: while that lives, nobody else begins; left behind, it shows
# that the set-up was interrupted. .venv/.ready is what make goes by.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

py=.venv/bin/python

# LeRobot needs Python 3.12, and numpy < 2.3, for which there are no wheels beyond 3.13.
check_python='
import sys
if not (3, 12) <= sys.version_info < (3, 14):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    if "--uv" not in sys.argv:
        sys.exit("is Python %d.%d without its venv module (Debian, Ubuntu: apt install python%d.%d-venv)" % (sys.version_info[:2] * 2))
print(sys.executable)
'

say() { echo "setup: $*" >&2; }

# What an interrupted set-up left behind may be half a package: start again from nothing.
if [ -e .venv/.installing ]; then
    other=$(cat .venv/.installing)
    if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
        say "process $other is making .venv: wait for it (if it is something else: rm .venv/.installing)"
        exit 1
    fi
    say "the last set-up was interrupted: starting again"
    rm -rf .venv
elif [ -e .venv ] && ! "$py" -c "$check_python" --uv >/dev/null 2>&1; then
    say "the Python in .venv does not work here (any more): making .venv again"
    rm -rf .venv
fi

uv=$(command -v uv || true)

if [ ! -e .venv ]; then
    names=(python3.12 python3.13 python3 python)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    python= tried=
    for name in "${names[@]}"; do
        # Every one on the PATH: a version manager's stand-in may come first and refuse.
        paths=$(type -aP "$name") || tried+="    $name: not found"$'\n'
        while read -r path; do
            if [ -z "$path" ] || [ -n "$python" ]; then
                continue
            elif answer=$("$path" -c "$check_python" ${uv:+--uv} 2>&1 </dev/null); then
                python=$answer
            else
                tried+="    $path: $(head -n 1 <<< "$answer")"$'\n'
            fi
        done <<< "$paths"
    done
    if [ -z "$python" ] && [ -n "$uv" ] && [ -z "${PYTHON:-}" ]; then
        say "no Python 3.12 or 3.13 on the PATH: leaving it to uv to find or fetch one"
        python=python3.12
    fi
    if [ -z "$python" ]; then
        say "kuavo_train needs Python 3.12 or 3.13, and there is none that works. Tried:"
        printf '%s' "$tried" >&2
        say "install one (apt install python3.12 python3.12-venv, or pyenv install 3.12, or uv), or name it:"
        say "    make setup PYTHON=/path/to/python3.12"
        exit 1
    fi
    say "making .venv with $python"
    mkdir .venv
    echo $$ > .venv/.installing
    make_venv=("$python" -m venv .venv)
    [ -z "$uv" ] || make_venv=("$uv" venv --quiet --allow-existing --python "$python" .venv)
    if ! "${make_venv[@]}"; then
        rm -rf .venv
        say "could not make .venv, for the reason above"
        exit 1
    fi
fi
echo $$ > .venv/.installing

venv_pip() {
    "$py" -c 'import pip' 2>/dev/null || "$py" -m ensurepip >/dev/null  # uv makes environments without it
    "$py" -m pip --disable-pip-version-check "$@"
}

# Who has pip but no uv may have named a package index to pip alone, and uv does not read that.
[ -n "$uv" ] || settings=$(venv_pip config list)
pip_setting() { sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" <<< "$settings" | sed 's/\\n/ /g' | tail -n 1; }

# So that an interrupted set-up never looks like a failed one, whatever the installers make of Ctrl-C.
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -z "$uv" ] && ! venv_pip install --quiet --constraint constraints.txt uv; then
    say "uv, the fast installer, cannot be had: going on with pip"
elif [ -z "$uv" ]; then
    uv=.venv/bin/uv
    index=$(pip_setting index-url) more=$(pip_setting extra-index-url) links=$(pip_setting find-links)
    if [ -n "$index$more$links" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}${UV_INDEX:-}" ]; then
        say "uv takes over the package index that pip is configured with"
        [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
        [ -z "$more" ] || export UV_INDEX="$more"
        [ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
        export UV_INDEX_STRATEGY=unsafe-best-match  # as pip does: the best version in any index
    fi
fi

# uv links packages from its cache; where that is on another disk it has to copy, and warns unless that is set.
if [ -n "$uv" ]; then
    cache=$("$uv" cache dir)
    mkdir -p "$cache"
    one_disk='import os, sys; a, b = map(os.stat, sys.argv[1:]); sys.exit(a.st_dev != b.st_dev)'
    "$py" -c "$one_disk" "$cache" .venv || export UV_LINK_MODE=copy
fi

wanted=(--constraint constraints.txt --editable '.[dev]')
[ -t 2 ] || wanted+=(--quiet)
say "installing the packages (the first time on a machine: some minutes, 6 GB of disk)"
if [ -z "$uv" ] || ! "$uv" pip install --python "$py" "${wanted[@]}"; then
    [ -z "$uv" ] || say "uv could not install them, for the reason above: trying pip"
    if ! venv_pip install "${wanted[@]}"; then
        rm .venv/.installing
        say "the packages could not be installed, for the reason above; when it is gone, make again"
        exit 1
    fi
fi
rm .venv/.installing
touch .venv/.ready
say "done"
