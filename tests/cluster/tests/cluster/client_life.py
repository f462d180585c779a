# SPDX-License-Identifier: Apache-2.0
"""One sandbox's life, through the client of upstream's that is on the PYTHONPATH.

client_life.py NAMESPACE POOL TEMPLATE WAY, where WAY to the sandbox is `pod` for its address,
`tunnel` for the router by kubectl port-forward, else the router's URL.
"""

import importlib.metadata
import io
import sys
import time

from k8s_agent_sandbox import SandboxClient, models

VERSION = importlib.metadata.version("k8s-agent-sandbox")
# What claims named before there was v1beta1.
NAMES_TEMPLATE = VERSION.startswith("0.4.")
STREAMS = not VERSION.startswith("0.")
PATIENCE = 240


def expect(is_so, what):
    if not is_so:
        raise SystemExit(f"{VERSION}: {what}")


def connection(way):
    if way == "pod":
        return models.SandboxInClusterConnectionConfig()
    if way == "tunnel":
        return models.SandboxLocalTunnelConnectionConfig()
    return models.SandboxDirectConnectionConfig(api_url=way)


def runs_commands(sandbox):
    kernel = sandbox.commands.run("dmesg")
    expect("Starting gVisor" in kernel.stdout, f"not gVisor's kernel: {kernel}")
    good = sandbox.commands.run("python3 -c 'print(6 * 7)'")
    expect((good.exit_code, good.stdout) == (0, "42\n"), good)
    bad = sandbox.commands.run("python3 -c 'import sys; sys.exit(\"sorry\")'")
    expect((bad.exit_code, bad.stderr) == (1, "sorry\n"), bad)


def keeps_files(sandbox):
    data = bytes(range(256)) * 4096
    sandbox.files.write("data.bin", data)
    expect(sandbox.files.read("data.bin") == data, "other bytes were read than written")
    size = sandbox.commands.run("wc -c data.bin")
    expect(size.stdout.split() == [str(len(data)), "data.bin"], size)
    sandbox.commands.run("python3 -c 'open(\"its.txt\", \"w\").write(\"own\")'")
    expect(sandbox.files.read("its.txt") == b"own", "its own file is not read")
    expect(sandbox.files.exists("its.txt"), "its.txt is not there")
    expect(not sandbox.files.exists("nothing"), "nothing is there")
    listed = {(entry.name, entry.size) for entry in sandbox.files.list(".")}
    expect({("data.bin", len(data)), ("its.txt", 3)} <= listed, listed)
    if STREAMS:
        sandbox.files.write("stream.bin", io.BytesIO(data))
        expect(sandbox.files.read("stream.bin") == data, "other bytes were read than streamed")


def main():
    namespace, pool, template, way = sys.argv[1:]
    client = SandboxClient(connection_config=connection(way))
    source = {"template": template} if NAMES_TEMPLATE else {"warmpool": pool}
    start = time.monotonic()
    sandbox = client.create_sandbox(
        namespace=namespace, sandbox_ready_timeout=PATIENCE, **source
    )
    ready = time.monotonic() - start
    try:
        runs_commands(sandbox)
        keeps_files(sandbox)
        claim = sandbox.claim_name
        expect(claim in client.list_all_sandboxes(namespace=namespace), "it is not listed")
        same = client.get_sandbox(claim, namespace=namespace)
        expect(same.sandbox_id == sandbox.sandbox_id, "another sandbox is found by its name")
    finally:
        sandbox.terminate()
    deadline = time.monotonic() + PATIENCE
    while claim in client.list_all_sandboxes(namespace=namespace):
        expect(time.monotonic() < deadline, "it is still listed")
        time.sleep(0.1)
    print(f"{VERSION} by {way}: ready in {ready * 1000:.0f} ms", file=sys.stderr)


main()
