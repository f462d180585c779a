# SPDX-License-Identifier: Apache-2.0
"""A sandbox that is suspended and resumed with its memory, through upstream's client.

client_snapshots.py NAMESPACE POOL
"""

import sys
import time

from k8s_agent_sandbox import models
from k8s_agent_sandbox.gke_extensions.snapshots import PodSnapshotSandboxClient

PATIENCE = 240
# A process that has what it counts in its memory alone, until it is asked.
COUNTER = """
import os, signal, time
count = 0
def tell(*_):
    with open('told.new', 'w') as file:
        file.write(f'{os.getpid()} {count}')
    os.rename('told.new', 'told')
signal.signal(signal.SIGUSR1, tell)
open('pid', 'w').write(str(os.getpid()))
while True:
    count += 1
    time.sleep(0.02)
"""


def expect(is_so, what):
    if not is_so:
        raise SystemExit(str(what))


def run(sandbox, command):
    done = sandbox.commands.run(command)
    expect(done.exit_code == 0, done)
    return done.stdout


def ask(sandbox):
    """The counter's pid and count."""
    run(sandbox, "sh -c 'rm -f told; kill -USR1 $(cat pid)'")
    for _ in range(200):
        told = run(sandbox, "sh -c 'cat told 2>/dev/null || true'").split()
        if told:
            return int(told[0]), int(told[1])
        time.sleep(0.05)
    raise SystemExit("the counter does not answer")


def wait_for(sandbox, path):
    for _ in range(200):
        if sandbox.commands.run(f"test -e {path}").exit_code == 0:
            return
        time.sleep(0.1)
    raise SystemExit(f"no {path}: {run(sandbox, 'cat log')}")


def timed(what, call):
    start = time.monotonic()
    result = call()
    took = (time.monotonic() - start) * 1000
    print(f"{what}: {took:.0f} ms", file=sys.stderr)
    expect(result.success, result)
    return result


def main():
    namespace, pool = sys.argv[1:]
    client = PodSnapshotSandboxClient(
        connection_config=models.SandboxInClusterConnectionConfig()
    )
    sandbox = client.create_sandbox(
        warmpool=pool, namespace=namespace, sandbox_ready_timeout=PATIENCE
    )
    try:
        sandbox.files.write("counter.py", COUNTER.encode())
        run(sandbox, "sh -c 'python3 counter.py >log 2>&1 &'")
        wait_for(sandbox, "pid")
        pid, before = ask(sandbox)
        first = timed("snapshot", lambda: sandbox.snapshots.create("first"))
        run(sandbox, "sh -c 'echo later > later'")

        suspended = timed("suspend", sandbox.suspend)
        latest = suspended.snapshot_response.snapshot_uid
        expect(latest != first.snapshot_uid, "one snapshot for two")
        # Whoever comes back later has nothing but the claim's name.
        sandbox = client.get_sandbox(sandbox.claim_name, namespace=namespace)
        expect(sandbox.is_suspended(), "it is not suspended")
        resumed = timed("resume", sandbox.resume)
        expect(resumed.restored_from_snapshot, resumed)
        expect(resumed.snapshot_uid == latest, resumed)
        same, count = ask(sandbox)
        expect(same == pid and count > before, (pid, before, same, count))
        expect(run(sandbox, "cat later") == "later\n", "a file is lost")

        timed("suspend", lambda: sandbox.suspend(snapshot_before_suspend=False))
        restored = timed("restore", lambda: sandbox.restore(first.snapshot_uid))
        expect(restored.restored_from_snapshot, restored)
        same, _ = ask(sandbox)
        expect(same == pid, "another process counts")
        there = run(sandbox, "ls").split()
        expect("later" not in there, f"it is not as it was at first: {there}")

        uids = {s.snapshot_uid for s in sandbox.snapshots.list().snapshots}
        expect(uids == {first.snapshot_uid, latest}, uids)
        deleted = timed("delete", lambda: sandbox.snapshots.delete(latest))
        expect(deleted.deleted_snapshots == [latest], deleted)
        deleted = timed("delete all", sandbox.snapshots.delete_all)
        expect(deleted.deleted_snapshots == [first.snapshot_uid], deleted)
        expect(not sandbox.snapshots.list().snapshots, "some are left")
    finally:
        sandbox.terminate()


main()
