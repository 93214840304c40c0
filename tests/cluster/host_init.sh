#!/bin/bash
# Process 1 of one rehearsal host, inside new mount, hostname, IPC, process and network namespaces.
#   host_init.sh NAME DIRECTORY      the directory of the whole cluster; NAME/ in it is this host's own disk
name=$1 cluster=$2 own=$2/$1
hostname "$name"
mount -t tmpfs tmpfs /dev/shm                 # shared memory is a host's own
mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/sshd /run/lock
mkdir -p "$HOME/.ssh" /var/local && mount --bind "$cluster/ssh" "$HOME/.ssh" && mount --bind "$own/disk" /var/local
mount --bind "$own/hosts" /etc/hosts
mount --bind "$own/hostname" /etc/hostname
mount --bind "$cluster/empty" /etc/resolv.conf
[ ! -e "$HOME/.bashrc" ] || mount --bind "$cluster/empty" "$HOME/.bashrc"   # the same PATH on every host
[ ! -d "$cluster/slurm" ] || { mkdir -p /etc/slurm && mount --bind "$cluster/slurm" /etc/slurm; }
ip link set lo up
/usr/sbin/sshd -D -e -f "$cluster/sshd_config" 2> "$own/sshd.log" &
for _ in $(seq 100); do (exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null && break; sleep 0.05; done
echo ready > "$own/ready"
trap 'exit 0' TERM
while :; do sleep 1 & wait -n 2>/dev/null; done   # orphans of ended jobs are collected here
