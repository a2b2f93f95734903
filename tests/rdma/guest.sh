#!/bin/sh
# Runs as root inside the guest, in a chroot to the shared root file system with an overlay of its own.
#   $1 interpreter   $2 repository   $3 folder of the installed NIXL, the one with nixl_cu12.libs
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
echo "guest: $(uname -r), device"
ip link set lo up
ip link add kv0 type dummy
ip addr add 10.99.0.1/24 dev kv0
ip link set kv0 mtu 9000 up
rdma link add rxe0 type rxe netdev kv0
rdma link show
# The wheel brings an ibverbs that looks for its drivers elsewhere; the system's finds the one for rxe.
for name in ibverbs mlx5; do
    for file in "$3"/nixl_cu12.libs/lib$name-*.so*; do
        mount --bind "$(readlink -f /usr/lib/x86_64-linux-gnu/lib$name.so.1)" "$file"
    done
done
ulimit -l unlimited
cd "$2"
echo "guest: python"
# GID 1 is the one made of the IPv4 address: RoCE v2. UCX says at `info` which transport carries what. No cache folder:
# nothing is compiled here, that takes minutes.
UCX_TLS=rc UCX_NET_DEVICES=rxe0:1 UCX_IB_GID_INDEX=1 UCX_LOG_LEVEL=info XDG_CACHE_HOME=/proc/none \
    PYTHONPATH="$3" PYTHONDONTWRITEBYTECODE=1 timeout 600 "$1" -m tests.rdma.push_pages
