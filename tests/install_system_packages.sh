#!/usr/bin/env bash
# Installs the system packages that tests need, where that is possible: Debian or Ubuntu, as root.
# Anywhere else it says so and changes nothing; the tests then skip with the reason.
# To be run before the set-up, which builds DeepSpeed's operators for NVMe where it finds libaio.
set -u
# tests/cluster: several hosts and a Slurm inside this machine. libpmix-dev: the Slurm plugin for srun --mpi=pmix opens
# libpmix.so, which only that package has. tests/engines: libaio-dev for offload to NVMe.
needed=(openssh-server pdsh slurm-wlm slurm-client libpmix-dev munge iproute2 libaio-dev)
have() {
    [ -e /usr/include/libaio.h ] && command -v sshd pdsh slurmctld slurmd srun munged ip nsenter unshare >/dev/null && [ -n "$(find /usr/lib -path "*/pmix2/lib/libpmix.so" -print -quit)" ]
}
PATH=$PATH:/usr/sbin:/sbin
have && exit 0
[ "$(id -u)" = 0 ] || { echo "tests: not root, so ${needed[*]} are not installed"; exit 0; }
command -v apt-get >/dev/null || { echo "tests: no apt-get, so ${needed[*]} are not installed"; exit 0; }
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# No service is to start on this machine: policy-rc.d is how packages are told.
[ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d && made=1; }
{ timeout 300 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends "${needed[@]}"; } > "$log" 2>&1 ||
    { echo "tests: could not install ${needed[*]}:"; tail -3 "$log"; }
[ -z "${made:-}" ] || rm -f /usr/sbin/policy-rc.d
rm -f "$log"
exit 0
