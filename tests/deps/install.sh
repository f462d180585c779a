#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs the third-party programs that Kiln's tests, demo and bench run against:
#
#     tests/deps/install.sh [COMPONENT…]      all of them without arguments; README.md lists them
#     tests/deps/install.sh --relock          pins the Debian packages that the archive has now
#
# Everything goes into $KILN_CACHE (default: $XDG_CACHE_HOME/kiln or ~/.cache/kiln):
#
#     bin/PROGRAM  cni/  python-…/            links to what is current
#     store/COMPONENT-KEY/                    one build; KEY is the hash of all that went into it
#     go/  apt/                               caches of the build tools
#
# A component is built in a temporary directory and renamed when complete, so a run that was killed
# leaves nothing half made, and the next one goes on where it stopped. Runs may overlap.
# shellcheck disable=SC2329 # build_NAME is called by its name
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${KILN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kiln}
mkdir -p "$cache"/{bin,store,go}
cache=$(cd "$cache" && pwd)
store=$cache/store

# A login shell is not needed to find iptables and ip.
PATH=$PATH:/usr/sbin:/sbin

# Go takes versions from go.mod and refuses whatever go.sum does not know; a workspace or a setting of
# the user's must not change that. DWARF is left out already by the compiler, which saves a fifth of
# its time. With -modcacherw the cache can be removed by rm.
export GOPATH=$cache/go GOMODCACHE=$cache/go/mod GOCACHE=$cache/go/build GOWORK=off CGO_ENABLED=0
export GOFLAGS='-mod=readonly -modcacherw -trimpath -buildvcs=false -gcflags=all=-dwarf=false'

say() { printf '[deps] %s\n' "$*" >&2; }

# For who looks at a build, beside its log.
notice() { say "notice: $*"; }

fail() {
  say "$*"
  exit 1
}

on_debian() { grep -qs '^ID=debian$' /etc/os-release; }

# --- what the components are made of -----------------------------------------------------------------

# build_NAME makes component NAME in $out, laid out as in $cache; $work is scratch space.

build_runsc() {
  runsc_of gvisor
}

# The release before, which has other forms of what Kiln does without commands:
# runsc-wrapper/src/releases.toml.
build_runsc-2026-02() {
  runsc_of gvisor-2026-02
  mv "$out/bin/runsc" "$out/bin/runsc-2026-02"
}

# For the images of other machines. Filters can be compiled only where they are for, so each sentry
# compiles its own.
build_runsc-arm64() {
  GOARCH=arm64 compile gvisor "$(runsc_stamp gvisor)" gvisor.dev/gvisor/runsc
  mkdir "$out/arm64"
  mv "$out/bin/runsc" "$out/arm64/"
}

# runsc_stamp DIR
runsc_stamp() {
  local module=gvisor.dev/gvisor version
  version=$(module_version "$1" $module) # v0.0.0-DATE…-COMMIT
  version=$(sed -E 's/.*-([0-9]{8})[0-9]*-/release-\1-/' <<<"$version")
  printf '%s' "-X $module/runsc/version.version=$version"
}

# The shim that Kiln is measured against, of the same gVisor. oom-score.patch says why it needs a patch.
build_containerd-shim-runsc-v1() {
  local library=github.com/containerd/containerd/v2
  own_module gvisor "$library"
  # The ceiling keeps git from applying the patch to a repository that the cache may lie in.
  GIT_CEILING_DIRECTORIES=$work git -C library apply "$here/gvisor/oom-score.patch"
  compile "$work" '' gvisor.dev/gvisor/shim
  mv "$out/bin/shim" "$out/bin/containerd-shim-runsc-v1"
}

build_containerd() {
  local module=github.com/containerd/containerd/v2 version
  version=$(module_version containerd "$module")
  compile containerd "-X $module/version.Version=${version#v}" \
    -tags 'no_btrfs no_devmapper no_zfs no_aufs osusergo netgo' \
    "$module"/cmd/{containerd,ctr,containerd-shim-runc-v2}
}

# What nodes still have: containerd alone, to be asked what it makes of configuration files.
build_containerd-1.7() {
  local module=github.com/containerd/containerd version
  version=$(module_version containerd-1.7 "$module")
  compile containerd-1.7 "-X $module/version.Version=${version#v}" \
    -tags 'no_btrfs no_devmapper no_zfs no_aufs osusergo netgo' "$module/cmd/containerd"
  mv "$out/bin/containerd" "$out/bin/containerd-1.7"
}

build_containerd-2.1() {
  local module=github.com/containerd/containerd/v2 version
  version=$(module_version containerd-2.1 "$module")
  compile containerd-2.1 "-X $module/version.Version=${version#v}" \
    -tags 'no_btrfs no_devmapper no_zfs no_aufs osusergo netgo' "$module/cmd/containerd"
  mv "$out/bin/containerd" "$out/bin/containerd-2.1"
}

build_cni() {
  local module=github.com/containernetworking/plugins
  compile cni "-X $module/pkg/utils/buildversion.BuildVersion=$(module_version cni "$module")" \
    "$module"/plugins/{main/bridge,main/loopback,main/ptp,ipam/host-local,meta/portmap}
  mv "$out/bin" "$out/cni"
}

# Static, with the archive's libseccomp.a, so that it needs nothing of the machine's. (The seccomp suites
# compare with runc, so it must have seccomp.)
build_runc() {
  if ! on_debian; then
    cp "$(command -v runc)" "$out/bin/"
    return
  fi
  debs "$work/root" libseccomp-dev/bookworm
  local lib
  lib=$(dirname "$(find "$work/root" -name libseccomp.a)")
  CGO_ENABLED=1 PKG_CONFIG_SYSROOT_DIR=$work/root PKG_CONFIG_PATH=$lib/pkgconfig \
    compile runc "-linkmode external -extldflags '-static -L$lib'" \
    -tags 'seccomp osusergo netgo urfave_cli_no_docs' github.com/opencontainers/runc
}

build_crictl() {
  compile cri-tools "$(cri_tools_stamp)" sigs.k8s.io/cri-tools/cmd/crictl
}

# critest is the test binary of its package: the command itself is empty.
build_critest() {
  cd "$here/cri-tools"
  go test -c -ldflags "-s -w $(cri_tools_stamp)" -o "$out/bin/critest" sigs.k8s.io/cri-tools/cmd/critest
}

cri_tools_stamp() {
  printf '%s' "-X sigs.k8s.io/cri-tools/pkg/version.Version=$(module_version cri-tools sigs.k8s.io/cri-tools)"
}

build_helm() {
  compile helm "-X helm.sh/helm/v4/internal/version.version=$(module_version helm helm.sh/helm/v4)" \
    helm.sh/helm/v4/cmd/helm
}

# Every server of Kubernetes, kubectl and etcd are one program; each name is a link to it.
build_kubernetes() {
  local version stamp name
  version=$(module_version kube k8s.io/kubernetes)
  stamp=k8s.io/component-base/version
  compile kube "-X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=$(cut -d. -f2 <<<"$version") \
    -X $stamp.gitTreeState=clean -X k8s.io/client-go/pkg/version.gitVersion=$version" -p 2 .
  for name in etcd kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubectl kubelet; do
    ln -s kube "$out/bin/$name"
  done
}

build_busybox() {
  if ! on_debian; then
    cp "$(command -v busybox)" "$out/bin/"
    return
  fi
  debs "$work/root" busybox-static/bookworm
  cp "$work/root/bin/busybox" "$out/bin/"
}

# An older runsc, as some nodes have it: what Kiln reads of runsc's must not be of one release only.
# On recent kernels (seen on 6.18) it takes every network namespace for the host's and runs no Pod in it,
# because it looks for a file that only the host's used to have. Later releases look for dev_weight; so
# does this one, by a path of the same length put in place of the old one.
build_runsc-2024() {
  debs "$work/root" 'runsc=0.0~20240729*'
  local core=/proc/sys/net/core
  sed "s|$core/rmem_default|$core/./dev_weight|" "$work/root/usr/bin/runsc" >"$out/bin/runsc-2024"
  grep -q "$core/./dev_weight" "$out/bin/runsc-2024"
  chmod 755 "$out/bin/runsc-2024"
}

# Python with the whole standard library and the shared libraries that its modules load; no shell.
build_python-rootfs() {
  local root=$out/python-rootfs
  local packages=(
    python3-minimal python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
    libc6 libgcc-s1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1
    libcrypt1 libreadline8 libtinfo6 libncursesw6
  )
  debs "$root" "${packages[@]/%//bookworm}"
  rm -rf "$root"/usr/share/{doc,man,lintian,locale,bug} "$root"/usr/lib/*/gconv
  mkdir -p "$root"/{dev,proc,sys,tmp,root}
  # Hash-based, because an image need not keep the time stamps that compiled modules are checked by.
  chroot "$root" /usr/bin/python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.11
  chroot "$root" /usr/bin/python3 -c 'import ctypes, http.server, json, sqlite3, ssl, uuid'
}

# Upstream's clients as they are published: an environment with what all of them need, and each
# client in a directory of its own, which goes on the PYTHONPATH. Only wheels, so that nothing of
# them is run here.
build_python-clients() {
  local clients=$out/python-clients file
  local install=(-m pip install -q --disable-pip-version-check --no-deps --require-hashes --only-binary :all:)
  python3 -m venv "$clients/venv"
  "$clients/venv/bin/python" "${install[@]}" -r "$here/python-clients/requirements.txt"
  for file in "$here"/python-clients/?.?.?.txt; do
    "$clients/venv/bin/python" "${install[@]}" --target "$clients/$(basename "$file" .txt)" -r "$file"
  done
  "$clients/venv/bin/python" -m pip check
}

# A node of Debian's packages: the disk that QEMU boots, with kernel and initrd beside it. vm/customize.sh
# makes a machine of the packages.
build_vm() {
  local root=$work/root packages=(
    systemd systemd-sysv dbus udev kmod initramfs-tools zstd linux-image-cloud-amd64 qemu-guest-agent
    containerd runc containernetworking-plugins iproute2 nftables iptables conntrack ethtool socat procps
  )
  # What the machine's apt says of how packages are got.
  apt-config dump Acquire >"$work/acquire"
  mmdebstrap --mode=root --variant=apt --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
    --aptopt="$work/acquire" --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --include="$(
      IFS=,
      echo "${packages[*]}"
    )" trixie "$root" "$(debian_mirror)"
  "$here/vm/customize.sh" "$root"
  mkdir "$out/vm"
  cp "$root"/boot/vmlinuz-* "$out/vm/vmlinuz"
  cp "$root"/boot/initrd.img-* "$out/vm/initrd.img"
  # Sparse: it takes 0.4 GB.
  truncate -s 6G "$out/vm/root.img"
  mke2fs -q -t ext4 -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$out/vm/root.img"
}

# --- tools of the builds -------------------------------------------------------------------------------

# runsc_of DIR: builds the runsc that DIR/go.mod pins, with its system call filters compiled, as a
# release has them: gvisor/precompile.go.
runsc_of() {
  own_module "$1" gvisor.dev/gvisor
  cp "$here/gvisor/precompile.go" .
  go run . library/runsc/boot/filter/filter_precompiled.go >filter
  mv filter library/runsc/boot/filter/filter_precompiled.go
  compile "$work" "$(runsc_stamp "$1")" gvisor.dev/gvisor/runsc
}

# compile DIR LDFLAGS ARGS…: go build of the packages in ARGS, stripped, into $out/bin. DIR (here or
# absolute) has the go.mod.
compile() {
  cd "$here" && cd "$1"
  go build -ldflags "-s -w $2" -o "$out/bin/" "${@:3}"
}

# own_module DIR MODULE: makes $work a copy of the module in DIR whose MODULE is in $work/library, to be
# changed there, and goes to $work.
own_module() {
  cp "$here/$1"/go.{mod,sum} "$work"
  cd "$work"
  go mod download "$2"
  cp -r "$(go list -m -f '{{.Dir}}' "$2")" library
  chmod -R u+w library
  go mod edit -replace "$2=./library"
}

# module_version DIR MODULE: what DIR/go.mod pins.
module_version() {
  awk -v module="$2" '$1 == "require" { $1 = ""; $0 = $0 } $1 == module { print $2 }' "$here/$1/go.mod"
}

# apt OPTION…: an apt tool with sources and lists of its own; the machine's stay as they are.
apt() {
  local apt=$cache/apt
  "$1" -q -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" \
    -o APT::Sandbox::User=root -o Acquire::Languages=none "${@:2}"
}

# Has apt know what the Debian archive has now.
update_debs() {
  local suite mirror
  mkdir -p "$cache"/apt/{lists,cache/archives}/partial
  mirror=$(debian_mirror)
  for suite in bookworm trixie; do
    echo "deb [target=Packages signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
  done >"$cache/apt/sources.list"
  apt apt-get update
}

# served PACKAGE: version and SHA-256 that the archive has of it; nothing if it has none.
served() {
  apt apt-cache show --no-all-versions "$1" 2>/dev/null |
    awk '$1 == "Version:" { version = $2 } $1 == "SHA256:" && !done { print version, $2; done = 1 }'
}

# pinned PACKAGE: version and SHA-256 that debian.lock has of it for this machine's architecture.
pinned() {
  awk -v package="$1" -v arch="$(dpkg --print-architecture)" \
    '$1 == package && $2 == arch { print $3, $4 }' "$here/debian.lock"
}

# debs DIR PACKAGE…: unpacks packages of the Debian archive into DIR; nothing is installed. PACKAGE is
# NAME/SUITE or NAME=VERSION, and which file that is debian.lock says. What the archive serves no more
# is replaced by what it has now, which its signature vouches for, and that is told.
debs() {
  local dir=$1 packages=("${@:2}") files=() sums=() i version sum served deb
  mkdir -p "$dir" "$work/debs"
  update_debs
  cd "$work/debs"
  for i in "${!packages[@]}"; do
    read -r version sum < <(pinned "${packages[i]}") || version=any sum=
    files[i]=${packages[i]%%[=/]*}=$version
    sums[i]=$sum
  done
  served=$({ apt apt-cache show "${files[@]}" || true; } |
    awk '$1 == "Package:" { name = $2 } $1 == "Version:" { print name "=" $2 }')
  for i in "${!files[@]}"; do
    grep -qxF -e "${files[i]}" <<<"$served" && continue
    notice "no pinned ${packages[i]} is served (debian.lock: ${files[i]}): today's is taken"
    files[i]=${packages[i]}
    sums[i]=
  done
  apt apt-get download "${files[@]}"
  for i in "${!files[@]}"; do
    [[ ${sums[i]} ]] || continue
    sha256sum --check --quiet <<<"${sums[i]}  $(echo "${files[i]%%=*}"_*.deb)" ||
      fail "${files[i]} is not the file that debian.lock names"
  done
  for deb in *.deb; do
    dpkg -x "$deb" "$dir"
  done
}

# Makes debian.lock say what the archive has now, for this machine's architecture.
relock() {
  local arch package of line version sum
  on_debian || fail "debian.lock is made on a Debian"
  arch=$(dpkg --print-architecture)
  lock
  update_debs >/dev/null
  while read -r line; do
    read -r package of _ <<<"$line"
    if [[ $of == "$arch" ]]; then
      read -r version sum < <(served "$package") || fail "the archive has no $package"
      line="$package $arch $version $sum"
    fi
    printf '%s\n' "$line"
  done <"$here/debian.lock" >"$here/debian.lock.new"
  mv "$here/debian.lock.new" "$here/debian.lock"
  unlock
}

# The address of the Debian archive that this machine uses.
debian_mirror() {
  # shellcheck disable=SC2016 # apt's own placeholder
  local query=(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian')
  [[ $("${query[@]}") ]] || apt-get -q update >&2 # apt knows labels only once it has lists
  "${query[@]}" | sed -n 1p
}

# --- the machine -----------------------------------------------------------------------------------------

# PROGRAM, Debian package, what it is for.
host_programs() {
  cat <<'END'
go          -                   builds runsc, containerd and the rest
git         git                 applies patches
ip          iproute2            network namespaces and links of Pods
iptables    iptables            CNI plugins, port-forward, kube-proxy
mount       mount               root filesystems, private mounts
nsenter     util-linux          looking into Pods and nodes
python3     python3,python3-venv runs upstream's clients
unshare     util-linux          private namespaces of tests
script      bsdutils            tests with a terminal
END
  if on_debian; then
    cat <<'END'
gcc         gcc,libc6-dev       builds runc
pkg-config  pkg-config          builds runc
END
    if [[ " $wanted " == *" runsc-arm64 "* ]]; then
      echo 'aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu,libc6-dev-arm64-cross links programs for arm64'
    fi
    if [[ " $wanted " == *" vm "* ]]; then
      cat <<'END'
mke2fs      e2fsprogs           disks of virtual machines
mmdebstrap  mmdebstrap          unpacks Debian for them
qemu-system-x86_64 qemu-system-x86,seabios runs them
END
    fi
  else
    cat <<'END'
runc        -                   the runtime that Kiln is compared with
busybox     -                   test images (it must be linked statically)
END
  fi
}

# have PROGRAM
have() {
  command -v "$1" >/dev/null || return 1
  [[ $1 != python3 ]] || python3 -c 'import ensurepip, venv' 2>/dev/null || return 1
  # ldd fails for a static program.
  [[ $1 != busybox ]] || on_debian || ! ldd "$(command -v busybox)" >/dev/null 2>&1
}

# Installs what the machine lacks if it is a Debian, else lists it and gives up.
prepare_host() {
  local program package purpose packages=() missing=()
  [[ $EUID == 0 ]] || missing+=("root rights: tests make namespaces, mounts and cgroups")
  while read -r program package purpose; do
    have "$program" && continue
    if on_debian && [[ $package != - && $EUID == 0 ]]; then
      packages+=("${package//,/ }")
    else
      missing+=("$program: $purpose")
    fi
  done < <(host_programs)
  if ((${#missing[@]})); then
    say "missing on this machine:"
    printf '[deps]   %s\n' "${missing[@]}" >&2
    exit 1
  fi
  ((${#packages[@]})) || return 0
  lock
  say "installing Debian packages: ${packages[*]}"
  apt-get -qq update >/dev/null
  # shellcheck disable=SC2068 # an entry may name several packages
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
    install -y --no-install-recommends ${packages[@]} >/dev/null
  unlock
}

# --- the store ---------------------------------------------------------------------------------------------

# One build at a time on this cache. The lock is held until the last child of a killed run has gone too.
lock() {
  exec 9>"$cache/lock"
  flock --nonblock 9 && return
  say "waiting for another run"
  flock 9
}

unlock() { exec 9>&-; }

# key COMPONENT FILE…: the hash of a component's build functions, the Go flags, and its input files.
key() {
  {
    declare -f "build_$1" compile
    [[ $1 != runsc* ]] || declare -f runsc_of runsc_stamp module_version
    echo "$GOFLAGS"
    cat "${@:2}"
  } | sha256sum | cut -c1-12
}

# component NAME SECONDS [FILE…]: sees to it that a component is there. SECONDS: how long it takes from
# nothing on two cores. FILE: inputs, beside the build function.
component() {
  local name=$1 seconds=$2 dir
  [[ " $wanted " == *" $name "* ]] || return 0
  dir=$store/$name-$(cd "$here" && key "$name" "${@:3}")
  if [[ -d $dir ]]; then
    say "$name: cached"
  else
    lock
    [[ -d $dir ]] || build "$name" "$seconds" "$dir"
    unlock
  fi
  publish "$dir"
}

# build NAME SECONDS DIR: runs build_NAME and makes DIR of what it leaves in $out. Needs the lock.
build() {
  local name=$1 seconds=$2 dir=$3 status
  rm -rf "$store"/tmp.* # of runs that were killed
  temporary=$(mktemp -d "$store/tmp.XXXXXX")
  trap 'rm -rf "$temporary"' EXIT
  work=$temporary/work out=$temporary/out
  mkdir -p "$work" "$out/bin"
  say "building $name … (about $seconds s)"
  SECONDS=0
  # Not "if ! (…)": bash ignores set -e in there.
  set +e
  (
    set -e
    "build_$name"
  ) >"$temporary/log" 2>&1 </dev/null
  status=$?
  set -e
  if ((status)); then
    tail -n 40 "$temporary/log" >&2
    fail "$name: build failed"
  fi
  grep -F '[deps] notice: ' "$temporary/log" >&2 || true
  chmod 755 "$out"
  mv -T "$out" "$dir"
  rm -rf "$temporary"
  say "$name: built in $SECONDS s"
}

# publish DIR: makes the links bin/PROGRAM and cni, python-… in the cache point into DIR.
publish() {
  local entry link
  for entry in "$1"/bin/* "$1"/*; do
    [[ -e $entry && $entry != "$1/bin" ]] || continue
    link=$cache${entry#"$1"}
    [[ $link -ef $entry ]] && continue
    ln -srfT "$entry" "$link.$$"
    mv -fT "$link.$$" "$link"
  done
}

# --- main --------------------------------------------------------------------------------------------------

# A function, so that bash has read the whole file before the first build: it may change meanwhile.
main() {
  if [[ ${1:-} == --relock ]]; then
    relock
    return
  fi
  local all='runsc containerd cni busybox python-rootfs crictl runc containerd-shim-runsc-v1 critest kubernetes helm python-clients runsc-2024 runsc-2026-02 containerd-1.7 containerd-2.1'
  if ! on_debian; then
    say "not a Debian: python-rootfs and runsc-2024 are left out, runc and busybox are the machine's"
    all=${all/python-rootfs /} all=${all/ runsc-2024/}
  fi
  wanted=${*:-$all}
  # What is built only where it is asked for.
  all+=' runsc-arm64 vm'
  local name
  for name in $wanted; do
    [[ " $all " == *" $name "* ]] || fail "no component $name; there are: $all"
  done

  prepare_host

  component runsc 120 gvisor/{go.mod,go.sum,precompile.go}
  component containerd 150 containerd/go.{mod,sum}
  component cni 10 cni/go.{mod,sum}
  component busybox 10 debian.lock
  component python-rootfs 15 debian.lock
  component crictl 90 cri-tools/go.{mod,sum}
  component runc 30 runc/go.{mod,sum} debian.lock
  component containerd-shim-runsc-v1 20 gvisor/go.{mod,sum} gvisor/oom-score.patch
  component critest 40 cri-tools/go.{mod,sum}
  component kubernetes 500 kube/{go.mod,go.sum,main.go}
  component helm 120 helm/go.{mod,sum}
  component python-clients 30 python-clients/{requirements,0.4.6,0.5.6,1.0.8}.txt
  component runsc-2024 10 debian.lock
  component runsc-2026-02 120 gvisor-2026-02/go.{mod,sum} gvisor/precompile.go
  component containerd-1.7 90 containerd-1.7/go.{mod,sum}
  component containerd-2.1 90 containerd-2.1/go.{mod,sum}
  component runsc-arm64 90 gvisor/go.{mod,sum}
  component vm 60 vm/customize.sh
}

main "$@"
exit
