# SPDX-License-Identifier: Apache-2.0
"""One sandbox's life, through the client of upstream's that is on the PYTHONPATH.

client_life.py NAMESPACE POOL TEMPLATE WAY blocking|async, where WAY to the sandbox is `pod` for
its address, `tunnel` for the router by kubectl port-forward, else the router's URL.
"""

import asyncio
import importlib.metadata
import inspect
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


async def done(result):
    return await result if inspect.isawaitable(result) else result


def connection(way):
    if way == "pod":
        return models.SandboxInClusterConnectionConfig()
    if way == "tunnel":
        return models.SandboxLocalTunnelConnectionConfig()
    return models.SandboxDirectConnectionConfig(api_url=way)


def connect(way, kind):
    if kind == "async":
        from k8s_agent_sandbox.async_sandbox_client import AsyncSandboxClient

        return AsyncSandboxClient(connection_config=connection(way), cleanup=False)
    return SandboxClient(connection_config=connection(way))


async def runs_commands(sandbox):
    run = sandbox.commands.run
    kernel = await done(run("dmesg"))
    expect("Starting gVisor" in kernel.stdout, f"not gVisor's kernel: {kernel}")
    good = await done(run("python3 -c 'print(6 * 7)'"))
    expect((good.exit_code, good.stdout) == (0, "42\n"), good)
    bad = await done(run("python3 -c 'import sys; sys.exit(\"sorry\")'"))
    expect((bad.exit_code, bad.stderr) == (1, "sorry\n"), bad)


async def keeps_files(sandbox):
    run, files = sandbox.commands.run, sandbox.files
    data = bytes(range(256)) * 4096
    await done(files.write("data.bin", data))
    expect(await done(files.read("data.bin")) == data, "other bytes were read than written")
    size = await done(run("wc -c data.bin"))
    expect(size.stdout.split() == [str(len(data)), "data.bin"], size)
    await done(run("python3 -c 'open(\"its.txt\", \"w\").write(\"own\")'"))
    expect(await done(files.read("its.txt")) == b"own", "its own file is not read")
    expect(await done(files.exists("its.txt")), "its.txt is not there")
    expect(not await done(files.exists("nothing")), "nothing is there")
    listed = {(entry.name, entry.size) for entry in await done(files.list("."))}
    expect({("data.bin", len(data)), ("its.txt", 3)} <= listed, listed)
    if STREAMS:
        await done(files.write("stream.bin", io.BytesIO(data)))
        expect(await done(files.read("stream.bin")) == data, "other bytes were read than streamed")


async def main():
    namespace, pool, template, way, kind = sys.argv[1:]
    client = connect(way, kind)
    source = {"template": template} if NAMES_TEMPLATE else {"warmpool": pool}
    start = time.monotonic()
    sandbox = await done(
        client.create_sandbox(namespace=namespace, sandbox_ready_timeout=PATIENCE, **source)
    )
    ready = time.monotonic() - start
    try:
        await runs_commands(sandbox)
        await keeps_files(sandbox)
        claim = sandbox.claim_name
        names = await done(client.list_all_sandboxes(namespace=namespace))
        expect(claim in names, "it is not listed")
        same = await done(client.get_sandbox(claim, namespace=namespace))
        expect(same.sandbox_id == sandbox.sandbox_id, "another sandbox is found by its name")
    finally:
        await done(sandbox.terminate())
    deadline = time.monotonic() + PATIENCE
    while claim in await done(client.list_all_sandboxes(namespace=namespace)):
        expect(time.monotonic() < deadline, "it is still listed")
        await asyncio.sleep(0.1)
    if kind == "async":
        await client.close()
    print(f"{VERSION} by {way}: ready in {ready * 1000:.0f} ms", file=sys.stderr)


asyncio.run(main())
