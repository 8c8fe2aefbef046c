#!/bin/sh
# Installs what the tests start and is not here yet: the registry servers, the firewall, the broker of
# the benchmarks, the browser and its driver (26 packages, 440 MB), and Node. On Debian, as root.
# Elsewhere it says what is missing, and the tests that need it are skipped with that reason.
set -eu

missing=
command -v etcd >/dev/null || missing="$missing etcd-server"
command -v java >/dev/null || missing="$missing default-jre-headless"
[ -e /usr/share/java/zookeeper.jar ] || missing="$missing libzookeeper-java"
command -v iptables-restore >/dev/null || missing="$missing iptables"
[ -x /usr/sbin/nats-server ] || command -v nats-server >/dev/null || missing="$missing nats-server"
command -v chromium >/dev/null || missing="$missing chromium"
command -v chromedriver >/dev/null || missing="$missing chromium-driver"
command -v node >/dev/null || missing="$missing nodejs"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "domi_fast: not installed, and their tests are skipped:$missing" >&2
    exit 0
fi
echo "domi_fast: installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
export RUNLEVEL=1 # the packages start no service of their own
# shellcheck disable=SC2086 # a list of names
apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 || {
    # The lists may be old or absent.
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
}
