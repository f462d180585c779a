// SPDX-License-Identifier: Apache-2.0

//! How containers and Pods begin and end.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{cri::v1, node::Node, pod::GUEST, wait};

pub(crate) async fn exit_codes(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    for code in [0, 7, 255] {
        let container = pod.script(&format!("exit {code}")).start().await?;
        let status = container.ended().await?;
        let reason = if code == 0 { "Completed" } else { "Error" };
        ensure!(
            (status.exit_code, status.reason.as_str()) == (code, reason),
            "wanted {code}: {status:?}"
        );
        ensure!(
            status.started_at > 0 && status.finished_at > 0,
            "{status:?}"
        );
    }
    pod.remove().await
}

/// The end can come before the shim has looked for it.
pub(crate) async fn short_lives_have_their_own_exit_code(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    for code in 1..=20 {
        let container = pod
            .container(["exit", &code.to_string()])
            .image(GUEST)
            .start()
            .await?;
        ensure!(
            container.exit_code().await? == code,
            "wanted {code}: {:?}",
            container.status().await?
        );
        container.remove().await?;
    }
    pod.remove().await
}

pub(crate) async fn a_killed_process_counts_its_signal(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    // Not the container's first process, which has no default action for a signal of its own.
    for (signal, code) in [("TERM", 143), ("KILL", 137), ("USR1", 138)] {
        let ran = container
            .exec(["sh", "-c", &format!("kill -{signal} $$")])
            .await?;
        ensure!(ran.code == code, "{signal}: {ran:?}");
    }
    pod.remove().await
}

pub(crate) async fn stop_gives_grace(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .script("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 1 & wait $!; done")
        .start()
        .await?;
    container.logged("ready").await?;
    container.stop(30).await?;
    ensure!(
        container.exit_code().await? == 3,
        "{:?}",
        container.status().await?
    );
    container.logged("bye").await?;
    pod.remove().await
}

pub(crate) async fn stop_ends_what_ignores_it(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .script("trap '' TERM; echo ready; while :; do sleep 1; done")
        .start()
        .await?;
    container.logged("ready").await?;
    let start = Instant::now();
    container.stop(2).await?;
    ensure!(
        start.elapsed().as_secs_f64() >= 1.9,
        "stopped after {:?} of 2 s of grace",
        start.elapsed()
    );
    ensure!(
        container.exit_code().await? == 137,
        "{:?}",
        container.status().await?
    );
    pod.remove().await
}

pub(crate) async fn containers_come_and_go_in_one_pod(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let stays = pod.idle().start().await?;
    for round in 0..3 {
        let container = pod.script(&format!("echo round {round}")).start().await?;
        ensure!(container.exit_code().await? == 0);
        container.logged(&format!("round {round}")).await?;
        container.remove().await?;
        node.expect_gone(container.id()).await?;
    }
    ensure!(
        stays.is_running().await?,
        "another container's end is not this one's"
    );
    pod.remove().await
}

pub(crate) async fn containers_start_together(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let run = async |n: i32| -> Result<()> {
        let container = pod.script(&format!("sleep 1; exit {n}")).start().await?;
        ensure!(
            container.exit_code().await? == n,
            "wanted {n}: {:?}",
            container.status().await?
        );
        Ok(())
    };
    try_join_all((1..=4).map(&run)).await?;
    pod.remove().await
}

pub(crate) async fn a_container_that_never_ran_is_removed(
    node: &Node,
    handler: &str,
) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().create().await?;
    ensure!(container.status().await?.state() == v1::ContainerState::ContainerCreated);
    container.remove().await?;
    pod.remove().await
}

pub(crate) async fn events_come_in_order(node: &Node, handler: &str) -> Result<()> {
    let log = node.dir().join(node.unique("events"));
    let events = node.ctr(["-n", "k8s.io", "events"]).background(&log)?;
    // `ctr events` does not say when it listens; what is before it is not in its log.
    let pod = wait::until("an event", wait::SOON, async || {
        let probe = node.pod(handler).run().await.ok()?;
        let seen = events.text().contains(probe.id());
        if seen {
            return Some(probe);
        }
        probe.remove().await.ok();
        None
    })
    .await?;
    let container = pod.script("exit 4").start().await?;
    container.ended().await?;
    let ran = pod.idle().start().await?;
    ran.exec(["true"]).await?;
    let (first, second) = (container.id().to_owned(), ran.id().to_owned());
    pod.remove().await?;
    let topics = |id: &str| -> Vec<String> {
        let text = events.text();
        let lines = text
            .lines()
            .filter(|l| l.contains(id) && l.contains("/tasks/"));
        lines
            .filter_map(|l| {
                l.split_whitespace()
                    .find_map(|w| w.strip_prefix("/tasks/"))
                    .map(str::to_owned)
            })
            .collect()
    };
    let expect = async |id: &str, expected: &[&str]| -> Result<()> {
        let done = wait::until_true("the last event", wait::SOON, || {
            topics(id).last().is_some_and(|t| t == "delete")
        })
        .await;
        done.with_context(|| format!("events of {id}: {:?}", topics(id)))?;
        ensure!(
            topics(id) == expected,
            "events of {id}: {:?}, not {expected:?}",
            topics(id)
        );
        Ok(())
    };
    expect(&first, &["create", "start", "exit", "delete"]).await?;
    expect(
        &second,
        &[
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit",
            "exit",
            "delete",
        ],
    )
    .await
}

pub(crate) async fn a_pod_knows_its_name_and_address(node: &Node, handler: &str) -> Result<()> {
    let pod = node
        .pod(handler)
        .with(|c| c.hostname = "my-name".to_owned())
        .run()
        .await?;
    let container = pod
        .idle()
        .env("COLOUR", "blue")
        .with(|c| c.working_dir = "/var/log".to_owned())
        .start()
        .await?;
    ensure!(container.sh("hostname").await? == "my-name\n");
    ensure!(container.sh("cat /etc/hostname").await? == "my-name\n");
    ensure!(container.sh("echo $COLOUR; pwd").await? == "blue\n/var/log\n");
    let (ip, addresses) = (pod.ip().await?, container.sh("ip -4 addr").await?);
    ensure!(
        addresses.contains(&format!("inet {ip}/")),
        "{ip} is not in {addresses}"
    );
    pod.remove().await
}

pub(crate) async fn pods_reach_each_other(node: &Node, handler: &str) -> Result<()> {
    let server = node.pod(handler).run().await?;
    let web = server
        .container(["httpd", "8080"])
        .image(GUEST)
        .start()
        .await?;
    let client = node.pod(handler).run().await?;
    let container = client.idle().start().await?;
    let fetch = format!(
        "for i in 1 2 3 4 5 6 7 8 9 10; do wget -q -O - http://{}:8080/ && exit 0; sleep 1; done; exit 1",
        server.ip().await?
    );
    ensure!(!container.sh(&fetch).await?.is_empty());
    ensure!(web.is_running().await?);
    client.remove().await?;
    server.remove().await
}

pub(crate) async fn a_user_is_no_more_than_that(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let user = |c: &mut v1::ContainerConfig| {
        let security = c
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        security.run_as_user = Some(v1::Int64Value { value: 1000 });
        security.run_as_group = Some(v1::Int64Value { value: 2000 });
        security.supplemental_groups = vec![3000];
        security.no_new_privs = true;
    };
    let container = pod
        .script("id -u; id -g; id -G; grep CapEff /proc/self/status; sleep 600")
        .with(user)
        .start()
        .await?;
    let log = container.logged("CapEff").await?;
    ensure!(log.starts_with("1000\n2000\n2000 3000\n"), "{log}");
    ensure!(log.contains("CapEff:\t0000000000000000"), "{log}");
    ensure!(container.sh("id -u").await? == "1000\n");
    pod.remove().await
}
