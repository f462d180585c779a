#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Takes out one guard after the other, in a copy of the sources, and demands that a test notices.
#
#   tests/mutate.sh [NAME…]      # names of tests/mutations/NAME.patch; all without
#
# A patch begins with lines `Test: KIND WHAT`:
#
#   Test: unit PACKAGE FILTER    # tests of the package's library, those that need root too
#   Test: bin PACKAGE FILTER     # tests of a package without a library
#   Test: real FILTER            # runsc-wrapper against real runtimes and the kernel
#   Test: isolation FILTER       # cases of that suite, with the changed shim and agent
#   Test: deploy FILTER          # cases of that suite, with the changed objects and controller
#   Test: controller FILTER      # cases of that suite, with the changed controller
#
# of which one at least must fail. Needs what the suites need, and the built isolation suite.
set -u
cd "$(dirname "$0")/.." || exit 1
ROOT=$PWD
TREE=$ROOT/target/mutate/tree
LOG=$ROOT/target/mutate/log
export CARGO_TARGET_DIR="$ROOT/target/mutate/target"
CARGO=${CARGO:-cargo}
# Where cargo puts programs below its target directory.
DEBUG=${CARGO_BUILD_TARGET:-$(rustc -vV | sed -n 's/^host: //p')}/debug
# Suites that others must not run beside are run by this, such as `flock FILE`.
ALONE=${ALONE:-}

fail() {
    echo "mutate: $*" >&2
    exit 1
}

# The sources as they are here, committed or not; times of what has not changed stay.
copy_sources() {
    rm -rf "$TREE" && mkdir -p "$TREE" "$LOG"
    git ls-files -z --cached --others --exclude-standard |
        tar --null -cf - -T - | tar -C "$TREE" -xf - || fail "copy the sources"
}

suite() {
    ls -t "$ROOT/target/$DEBUG"/deps/isolation-* 2>/dev/null | grep -v '\.d$' | head -n 1
}

# Whether a test notices. It builds first: that a change does not compile is no answer.
notices() { # KIND WHAT…
    kind=$1
    shift
    case $kind in
    unit)
        (cd "$TREE" && $CARGO test -q -p "$1" --all-features --lib --no-run) || fail "build $1"
        ! (cd "$TREE" && $CARGO test -p "$1" --all-features --lib -- --include-ignored "$2")
        ;;
    bin)
        (cd "$TREE" && $CARGO test -q -p "$1" --bins --no-run) || fail "build $1"
        ! (cd "$TREE" && $CARGO test -p "$1" --bins -- "$2")
        ;;
    real)
        (cd "$TREE" && $CARGO test -q -p runsc-wrapper --test real --no-run) || fail "build real"
        ! (cd "$TREE" && $CARGO test -p runsc-wrapper --test real -- --include-ignored "$1")
        ;;
    isolation)
        (cd "$TREE" && $CARGO build -q -p kiln-shim -p kiln-node-agent) || fail "build the shim"
        ! (cd tests && KILN_BIN_DIR=$CARGO_TARGET_DIR/$DEBUG $ALONE "$(suite)" "$1")
        ;;
    deploy | controller)
        (cd "$TREE" && $CARGO build -q -p kiln-controller &&
            $CARGO test -q -p kiln-cluster --test "$kind" --no-run) || fail "build the suite"
        ! (cd "$TREE" && $ALONE $CARGO test -p kiln-cluster --test "$kind" -- "$1")
        ;;
    *) fail "no kind of test: $kind" ;;
    esac
}

mutate() { # NAME
    patch=$ROOT/tests/mutations/$1.patch
    (cd "$TREE" && patch -s -p1 <"$patch") || fail "$1.patch does not apply: mend it"
    noticed=
    tests=$(sed -n 's/^Test: //p' "$patch")
    old_ifs=$IFS
    IFS='
'
    for test in $tests; do
        IFS=$old_ifs
        # shellcheck disable=SC2086 # words of one line
        if notices $test >"$LOG/$1.log" 2>&1; then
            noticed=$test
            break
        fi
        grep -q '^mutate: ' "$LOG/$1.log" && fail "$1: $(grep '^mutate: ' "$LOG/$1.log")"
    done
    IFS=$old_ifs
    (cd "$TREE" && patch -s -R -p1 <"$patch") || fail "undo $1.patch"
    if [ -z "$noticed" ]; then
        echo "NOT NOTICED  $1"
        return 1
    fi
    echo "noticed      $1, by $noticed"
}

copy_sources
[ $# -gt 0 ] || set -- $(cd tests/mutations && ls ./*.patch | sed 's|^\./||; s|\.patch$||')
missed=0
for name; do
    mutate "$name" || missed=$((missed + 1))
done
echo "$# guards taken out, $missed not noticed"
[ "$missed" -eq 0 ]
