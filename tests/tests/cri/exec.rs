// SPDX-License-Identifier: Apache-2.0

//! Further processes in a running container.

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{cri::v1, node::Node, terminal::Terminal, wait};

pub(crate) async fn an_exec_answers(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let ran = container
        .exec(["sh", "-c", "echo to out; echo to err >&2; exit 5"])
        .await?;
    ensure!(
        (ran.code, ran.stdout.as_str(), ran.stderr.as_str()) == (5, "to out\n", "to err\n"),
        "{ran:?}"
    );
    let long = container
        .sh("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done")
        .await?;
    ensure!(
        long.lines().count() == 20_000 && long.ends_with("line 19999\n"),
        "{} lines",
        long.lines().count()
    );
    for _ in 0..20 {
        ensure!(container.sh("echo quick").await? == "quick\n");
    }
    pod.remove().await
}

pub(crate) async fn execs_run_side_by_side(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let run = async |n: i32| -> Result<()> {
        let ran = container
            .exec(["sh", "-c", &format!("sleep 1; echo {n}; exit {n}")])
            .await?;
        ensure!(
            (ran.code, ran.stdout) == (n, format!("{n}\n")),
            "wanted {n}, got {}",
            ran.code
        );
        Ok(())
    };
    try_join_all((0..10).map(&run)).await?;
    pod.remove().await
}

pub(crate) async fn a_missing_program_is_an_error_and_no_more(
    node: &Node,
    handler: &str,
) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    for _ in 0..3 {
        let failed = container.exec(["/no/such/program"]).await;
        ensure!(
            failed
                .as_ref()
                .is_err_and(|e| format!("{e:#}").contains("no such file")),
            "{failed:?}"
        );
    }
    ensure!(container.is_running().await?);
    ensure!(container.sh("echo still there").await? == "still there\n");
    let missing = pod.container(["/no/such/program"]).create().await?;
    let failed = missing.start().await;
    ensure!(
        failed
            .as_ref()
            .is_err_and(|e| format!("{e:#}").contains("no such file")),
        "{failed:?}"
    );
    let status = missing.status().await?;
    ensure!(
        status.state() == v1::ContainerState::ContainerExited,
        "{status:?}"
    );
    pod.remove().await
}

pub(crate) async fn input_reaches_an_exec_and_ends(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let input = "a line\n".repeat(30_000);
    let cat = node
        .crictl(["exec", "--interactive", container.id(), "cat"])
        .input(input.as_bytes())
        .run()
        .await?;
    ensure!(
        cat == input,
        "{} of {} bytes came back",
        cat.len(),
        input.len()
    );
    let count = node
        .crictl(["exec", "--interactive", container.id(), "wc", "-c"])
        .input(b"")
        .run()
        .await?;
    ensure!(count.trim() == "0", "{count}");
    pod.remove().await
}

pub(crate) async fn an_ended_container_takes_no_exec(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.script("exit 0").start().await?;
    container.ended().await?;
    let refused = container.exec(["true"]).await;
    ensure!(refused.is_err(), "{refused:?}");
    pod.remove().await
}

pub(crate) async fn an_exec_at_a_terminal(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let shell = node.ctr([
        "-n",
        "k8s.io",
        "task",
        "exec",
        "--tty",
        "--exec-id",
        "terminal",
        container.id(),
        "sh",
    ]);
    let mut terminal = Terminal::run(&shell, 101, 31)?;
    terminal.expect("/ #").await?;
    // Sizes come through containerd, in their own time. Quotes keep the echo of what is typed
    // from being taken for the answer.
    let until = |size: &str| {
        format!("until [ \"$(stty size)\" = '{size}' ]; do sleep 0.1; done; echo si''zed\n")
    };
    terminal.send(&until("31 101"))?;
    terminal.expect("sized").await?;
    terminal.resize(66, 22)?;
    terminal.send(&until("22 66"))?;
    terminal.expect("sized").await?;
    terminal.send("test -t 0 && test -t 1 && echo a ter''minal\n")?;
    terminal.expect("a terminal").await?;
    terminal.send("sleep 600\n")?;
    // A shell makes a process the terminal's foreground before it runs the program.
    wait::until("the sleep", wait::SOON, async || {
        let processes = container.sh("ps").await.ok()?;
        processes.contains("sleep 600").then_some(())
    })
    .await?;
    terminal.send("\x03")?;
    terminal.send("echo inter''rupted\n")?;
    terminal.expect("interrupted").await?;
    terminal.send("exit 5\n")?;
    let status = terminal.ended().await?;
    ensure!(status.code() == Some(5), "{status}");
    ensure!(container.is_running().await?);
    pod.remove().await
}

pub(crate) async fn an_exec_outlives_its_deadline_not(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let request = v1::ExecSyncRequest {
        container_id: container.id().to_owned(),
        cmd: ["sleep", "777"].map(str::to_owned).to_vec(),
        timeout: 1,
    };
    let late = node.cri().runtime().exec_sync(request).await;
    ensure!(
        late.as_ref()
            .is_err_and(|e| e.code() == tonic::Code::DeadlineExceeded),
        "{late:?}"
    );
    ensure!(
        !container.sh("ps").await?.contains("sleep 777"),
        "the exec goes on"
    );
    pod.remove().await
}
