#!/usr/bin/env bash
# Make the virtual environment and install the pinned packages into it. Usage: infra/setup.sh .venv
set -euo pipefail
venv=${1:?usage: infra/setup.sh VENV}
python=${PYTHON:-python3.11}
cd "$(dirname "$0")/.."

command -v "$python" >/dev/null || python=python3
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
  { echo "Forebay needs Python 3.11 (set PYTHON=…)" >&2; exit 1; }
if [ "$version" != 3.11 ]; then
  echo "Forebay needs Python 3.11, $python is $version (set PYTHON=…)" >&2
  exit 1
fi

# Debian keeps venv in a package of its own.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "· installing python3-venv" >&2
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
  else
    echo "The venv module is missing: apt-get install python3-venv" >&2
    exit 1
  fi
fi

[ -x "$venv/bin/python" ] || { echo "· creating $venv" >&2; "$python" -m venv "$venv"; }
echo "· installing pinned packages (a few minutes the first time)" >&2
# torch goes first and alone, so that no other requirement can pull another build of it.
"$venv/bin/pip" install -q -c constraints.txt torch==2.13.0
"$venv/bin/pip" install -q -c constraints.txt -e '.[dev]'
echo "· ready" >&2
