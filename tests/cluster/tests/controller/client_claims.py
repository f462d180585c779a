# SPDX-License-Identifier: Apache-2.0
"""Claims of one client of upstream's that is on the PYTHONPATH: made, named, taken over, ended.

client_claims.py blocking|async NAMESPACE, where the pool `p` has Sandboxes ready, those of pool
`slow` take a moment, and those of pool `never` are never ready.
"""

import asyncio
import inspect
import logging
import sys
import time

from k8s_agent_sandbox import SandboxClient, models
from k8s_agent_sandbox.async_sandbox_client import AsyncSandboxClient

PATIENCE = 60


def expect(is_so, what):
    if not is_so:
        raise SystemExit(f"{sys.argv[1]} client: {what}")


async def done(result):
    return await result if inspect.isawaitable(result) else result


async def fails(kind, request, text=""):
    """Expects an exception of a class of that name, which both clients have, and returns it."""
    try:
        found = await done(request())
    except Exception as error:
        is_kind = any(base.__name__ == kind for base in type(error).__mro__)
        expect(is_kind and text in str(error), f"not {kind} {text!r}: {error!r}")
        return error
    expect(False, f"no {kind}: {found!r}")


async def until(what, probe):
    deadline = time.monotonic() + PATIENCE
    while not await probe():
        expect(time.monotonic() < deadline, f"waited for {what}")
        await asyncio.sleep(0.05)


class Case:
    def __init__(self, kind, namespace):
        self.kind, self.namespace = kind, namespace

    def client(self):
        way = models.SandboxInClusterConnectionConfig()
        if self.kind == "async":
            return AsyncSandboxClient(connection_config=way, cleanup=False)
        return SandboxClient(connection_config=way)

    async def close(self, client):
        if self.kind == "async":
            await client.close()

    async def make(self, client, pool="p", **options):
        options.setdefault("sandbox_ready_timeout", PATIENCE)
        return await done(client.create_sandbox(pool, namespace=self.namespace, **options))

    async def claim(self, client, name):
        return await done(client.k8s_helper.get_sandbox_claim(name, self.namespace))

    async def names(self, client, **options):
        return await done(client.list_all_sandboxes(namespace=self.namespace, **options))

    async def gone(self, client, name):
        async def probe():
            return name not in await self.names(client)

        await until(f"{name} to be gone", probe)

    async def named_ones_are_taken_over(self, one, other):
        mine = await self.make(one, claim_name="mine", labels={"team": "blue"})
        conflict = await fails("ApiException", lambda: self.make(other, claim_name="mine"))
        expect(conflict.status == 409, conflict)
        expect(await self.names(one, label_selector="team=blue") == ["mine"], "it is not listed")
        same = await self.make(other, claim_name="mine", adopt_existing=True)
        expect(same.sandbox_id == mine.sandbox_id, "another Sandbox is taken over")
        expect((await done(same.status()))[0] == "SandboxReady", await done(same.status()))
        expect(await done(same.get_pod_ip()), "it has no address")
        expect(await done(same.get_pod_name()) == same.sandbox_id, "its Pod has another name")
        await fails(
            "ValueError",
            lambda: self.make(other, "slow", claim_name="mine", adopt_existing=True),
            "references warm pool 'p'",
        )
        await done(one.delete_sandbox("mine", self.namespace))
        await self.gone(one, "mine")

    async def one_that_is_not_ready_yet_is_waited_for(self, one, other):
        await done(one.k8s_helper.create_sandbox_claim("slow", "slow", self.namespace))
        taken = await self.make(other, "slow", claim_name="slow", adopt_existing=True)
        claim = await self.claim(one, "slow")
        expect(claim["status"]["sandbox"]["name"] == taken.sandbox_id, claim)
        await done(other.delete_sandbox("slow", self.namespace))
        await self.gone(one, "slow")

    async def only_the_very_one_is_deleted(self, one):
        helper = one.k8s_helper
        await self.make(one, claim_name="very")
        uid = (await self.claim(one, "very"))["metadata"]["uid"]
        other = "00000000-0000-0000-0000-000000000001"
        delete = lambda uid: helper.delete_sandbox_claim("very", self.namespace, expected_uid=uid)
        conflict = await fails("ApiException", lambda: delete(other))
        expect(conflict.status == 409, conflict)
        expect((await self.claim(one, "very"))["metadata"]["uid"] == uid, "another one was meant")
        await done(delete(uid))
        await self.gone(one, "very")
        # That it is gone is as good.
        await done(delete(uid))

    async def what_is_never_ready_is_rolled_back(self, one):
        options = {"sandbox_ready_timeout": 1}
        await fails("TimeoutError", lambda: self.make(one, "never", **options))
        expect(await self.names(one) == [], "a claim is left")
        await fails("TimeoutError", lambda: self.make(one, "never", claim_name="own", **options))
        expect(await self.names(one) == ["own"], "a claim that was named is deleted")
        await done(one.k8s_helper.delete_sandbox_claim("own", self.namespace))
        await self.gone(one, "own")

    async def failures_that_last_are_not_waited_for(self, one):
        begun = time.monotonic()
        await fails("SandboxWarmPoolNotFoundError", lambda: self.make(one, "nowhere"), "nowhere")
        await fails(
            "SandboxClaimFailedError",
            lambda: self.make(one, pod_labels={"team": "blue"}),
            "InvalidMetadata",
        )
        expect(time.monotonic() - begun < PATIENCE, "it waited all the same")
        expect(await self.names(one) == [], "a claim is left")

    async def what_it_brings_comes_to_the_pod(self, one):
        brought = await self.make(
            one,
            env={"GREETING": "hello"},
            pod_labels={"sandbox.users.io/team": "blue"},
            pod_annotations={"note": "n"},
            shutdown_after_seconds=3600,
        )
        name = brought.claim_name
        claim = await self.claim(one, name)
        expect(claim["spec"]["lifecycle"]["shutdownPolicy"] == "Delete", claim)
        sandbox = await done(one.k8s_helper.get_sandbox(brought.sandbox_id, self.namespace))
        pod = sandbox["spec"]["podTemplate"]
        env = {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"]}
        expect(env == {"GREETING": "hello"}, env)
        expect(pod["metadata"]["labels"]["sandbox.users.io/team"] == "blue", pod["metadata"])
        expect(pod["metadata"]["annotations"]["note"] == "n", pod["metadata"])
        await done(brought.terminate())
        await done(brought.terminate())
        await self.gone(one, name)

    async def one_ends_at_its_time(self, one):
        ends = await self.make(one, shutdown_after_seconds=2)
        await self.gone(one, ends.claim_name)

    async def what_was_named_outlives_its_client(self, one):
        client = self.client()
        if self.kind == "async":
            async with client:
                kept, lost = await self.make(client, claim_name="kept"), await self.make(client)
        else:
            with client:
                kept, lost = await self.make(client, claim_name="kept"), await self.make(client)
        await self.gone(one, lost.claim_name)
        again = await done(one.get_sandbox("kept", namespace=self.namespace))
        expect(again.sandbox_id == kept.sandbox_id, "another Sandbox is found by the name")
        await done(again.terminate())
        await self.gone(one, "kept")


async def main():
    case = Case(*sys.argv[1:])
    # It logs the failures that are asked for.
    logging.disable(logging.CRITICAL)
    one, other = case.client(), case.client()
    try:
        await case.named_ones_are_taken_over(one, other)
        await case.one_that_is_not_ready_yet_is_waited_for(one, other)
        await case.only_the_very_one_is_deleted(one)
        await case.what_is_never_ready_is_rolled_back(one)
        await case.failures_that_last_are_not_waited_for(one)
        await case.what_it_brings_comes_to_the_pod(one)
        await case.one_ends_at_its_time(one)
        await case.what_was_named_outlives_its_client(one)
    finally:
        for client in (one, other):
            await case.close(client)


asyncio.run(main())
