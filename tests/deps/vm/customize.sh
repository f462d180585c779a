#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a machine of Debian's packages in the directory $1: the disk that holds them, the disk with what a
# test brings, at /mnt, and the network that QEMU has for it, which leads nowhere.
set -euo pipefail
root=$1

rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"
: >"$root/etc/resolv.conf"
echo node1 >"$root/etc/hostname"
printf '127.0.0.1 localhost\n10.0.2.15 node1\n' >"$root/etc/hosts"
printf '/dev/vda / ext4 defaults,noatime 0 1\n/dev/vdb /mnt ext4 ro,noatime 0 0\n' >"$root/etc/fstab"
cat >"$root/etc/systemd/network/10-vm.network" <<'END'
[Match]
Name=en* eth*
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
LinkLocalAddressing=no
IPv6AcceptRA=no
END

systemctl --root="$root" enable -q systemd-networkd
# What waits for a network, or works where nobody waits for it.
systemctl --root="$root" mask -q systemd-networkd-wait-online.service systemd-timesyncd.service \
  apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service

# A small initrd: without KVM, unpacking is slow.
printf 'virtio_pci\nvirtio_blk\next4\n' >"$root/etc/initramfs-tools/modules"
echo MODULES=list >"$root/etc/initramfs-tools/conf.d/vm"
mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT
chroot "$root" update-initramfs -u
