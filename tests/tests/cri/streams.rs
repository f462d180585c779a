// SPDX-License-Identifier: Apache-2.0

//! What goes in and out of containers: logs, input, terminals, ports.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::Node,
    pod::{BUSYBOX, GUEST},
    process::{Background, Cmd},
    terminal::Terminal,
    wait,
};

pub(crate) async fn logs_keep_streams_apart(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .script("echo to out; echo to err >&2; printf 'no end of line'")
        .start()
        .await?;
    ensure!(container.exit_code().await? == 0);
    // Each stream is logged in its own time.
    container.logged("no end of line").await?;
    container.logged("to err\n").await?;
    ensure!(
        container
            .log_stream("stdout")
            .starts_with("to out\nno end of line"),
        "{}",
        container.log_stream("stdout")
    );
    ensure!(
        container.log_stream("stderr") == "to err\n",
        "{}",
        container.log_stream("stderr")
    );
    pod.remove().await
}

pub(crate) async fn a_long_output_is_complete(node: &Node, handler: &str) -> Result<()> {
    const BYTES: usize = 20 << 20;
    let pod = node.pod(handler).run().await?;
    let container = pod
        .container(["spam", &BYTES.to_string()])
        .image(GUEST)
        .start()
        .await?;
    ensure!(container.exit_code().await? == 0);
    // The lines are numbered, and containerd writes the file in its own time.
    let written = wait::until("all of the output", wait::SOON, async || {
        let log = container.log();
        (log.trim_end().len() + 1 >= BYTES).then_some(log)
    });
    let log = written
        .await
        .with_context(|| format!("{} bytes came of {BYTES}", container.log().len()))?;
    ensure!(
        log.lines().count() == BYTES.div_ceil(105),
        "{} lines",
        log.lines().count()
    );
    pod.remove().await
}

pub(crate) async fn the_last_words_are_logged(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    for round in 0..10 {
        let words = format!("last words {round}");
        let container = pod.script(&format!("echo {words}")).start().await?;
        container.ended().await?;
        container.logged(&words).await?;
        container.remove().await?;
    }
    pod.remove().await
}

pub(crate) async fn an_attached_client_is_read(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .script("read line; echo got $line; cat; echo end of input")
        .stdin(true)
        .start()
        .await?;
    let attach = node
        .crictl(["attach", "--stdin", container.id()])
        .input(b"hello\nand more\n");
    let attached = attach.run().await?;
    // The container ends because its input does, when the only client is gone.
    ensure!(container.exit_code().await? == 0);
    container.logged("end of input").await?;
    ensure!(
        container.log().starts_with("got hello\nand more\n"),
        "{}; attached: {attached}",
        container.log()
    );
    pod.remove().await
}

pub(crate) async fn a_terminal_of_a_container(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.container(["sh"]).tty().stdin(false).start().await?;
    let mut terminal = Terminal::run(
        &node.crictl(["attach", "--stdin", "--tty", container.id()]),
        90,
        20,
    )?;
    terminal.send("test -t 0 && echo $((40 + 2))\n")?;
    terminal.expect("42").await?;
    terminal.send("exit 6\n")?;
    terminal.ended().await?;
    ensure!(
        container.exit_code().await? == 6,
        "{:?}",
        container.status().await?
    );
    container.logged("42").await?;
    pod.remove().await
}

/// `ctr run` of our shim, with busybox as image `id` and its cgroup where the node's are.
fn ctr_run(node: &Node, handler: &str, id: &str, flags: &[&str], script: &str) -> Cmd {
    let config = node.dir().join(format!("{handler}.toml"));
    let cgroup = format!("{}/{id}", node.cgroup().parent());
    let runtime = [
        "-n",
        "k8s.io",
        "run",
        "--runtime",
        "io.containerd.kiln.v2",
        "--runtime-config-path",
    ];
    node.ctr(runtime)
        .args([config.as_os_str()])
        .args(["--cgroup", &cgroup])
        .args(flags)
        .args([BUSYBOX, id, "sh", "-c", script])
}

pub(crate) async fn a_log_file_of_ctr(node: &Node, handler: &str) -> Result<()> {
    let id = node.unique("logfile");
    let file: PathBuf = node.dir().join(format!("{id}.log"));
    let uri = format!("file://{}", file.display());
    ctr_run(
        node,
        handler,
        &id,
        &["--detach", "--log-uri", &uri],
        "echo to out; echo to err >&2; sleep 600",
    )
    .run()
    .await?;
    let read = || std::fs::read_to_string(&file).unwrap_or_default();
    let both = wait::until_true("both lines", wait::SOON, || read().len() >= 14).await;
    both.with_context(|| format!("the file has {:?}", read()))?;
    ensure!(read() == "to out\nto err\n", "{:?}", read());
    node.ctr(["-n", "k8s.io", "task", "delete", "--force", &id])
        .run()
        .await?;
    node.ctr(["-n", "k8s.io", "container", "delete", &id])
        .run()
        .await?;
    node.expect_gone(&id).await
}

/// The Go shim hangs here (gVisor issue 4544).
pub(crate) async fn a_plain_run_of_ctr(node: &Node, handler: &str) -> Result<()> {
    let id = node.unique("plain");
    let run = ctr_run(
        node,
        handler,
        &id,
        &["--rm"],
        "echo to out; echo to err >&2; exit 9",
    )
    .output()
    .await?;
    ensure!(
        (run.code(), run.text().as_str()) == (9, "to out\n"),
        "{run:?}"
    );
    ensure!(run.errors().contains("to err\n"), "{run:?}");
    node.expect_gone(&id).await?;

    let id = node.unique("plain");
    // The size comes when the process runs already.
    let script = "until [ \"$(stty size)\" = '33 77' ]; do sleep 0.1; done; echo sized; read line; echo got $line; exit 8";
    let mut terminal = Terminal::run(
        &ctr_run(node, handler, &id, &["--rm", "--tty"], script),
        77,
        33,
    )?;
    terminal.expect("sized").await?;
    terminal.send("words\n")?;
    terminal.expect("got words").await?;
    let status = terminal.ended().await?;
    ensure!(status.code() == Some(8), "{status}");
    node.expect_gone(&id).await
}

pub(crate) async fn ports_are_forwarded(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    for port in ["80", "8080"] {
        pod.container(["httpd", port]).image(GUEST).start().await?;
    }
    let forward = |ports: &[&str]| -> Result<Background> {
        let log = node.dir().join(node.unique("forward"));
        node.crictl(["port-forward", pod.id()])
            .args(ports)
            .background(&log)
    };
    let both = forward(&[":80", ":8080"])?;
    let (http, other) = (
        local_end(&both, "80").await?,
        local_end(&both, "8080").await?,
    );
    for address in [http, other, http] {
        let answer = wait::until("an answer", wait::SOON, async || {
            get(node, address).ok().filter(|a| !a.is_empty())
        });
        let answer = answer.await.with_context(|| both.text())?;
        ensure!(answer.starts_with("HTTP/1."), "{answer}");
    }
    // Nobody listens there: the connection ends without a byte, the client is told that it failed,
    // and others are none the worse.
    let closed = forward(&[":81"])?;
    let answer = get(node, local_end(&closed, "81").await?);
    ensure!(answer.unwrap_or_default().is_empty());
    closed.expect("error forwarding port 81").await?;
    ensure!(get(node, http)?.starts_with("HTTP/1."));
    drop((both, closed));
    pod.remove().await
}

/// Where `crictl port-forward` listens for `port` of the Pod.
async fn local_end(forward: &Background, port: &str) -> Result<SocketAddr> {
    let arrow = format!(" -> {port}\n");
    let text = forward.expect(&arrow).await?;
    let line = text
        .lines()
        .find(|l| l.ends_with(arrow.trim_end()) && l.contains("127.0.0.1:"))
        .context("no line")?;
    let address = line
        .split_whitespace()
        .find(|w| w.starts_with("127.0.0.1:"))
        .context("no address")?;
    Ok(address.parse()?)
}

/// Asks a web server on the node's loopback.
fn get(node: &Node, address: SocketAddr) -> Result<String> {
    node.netns().run(|| {
        let mut stream = TcpStream::connect(address).context("connect")?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET / HTTP/1.0\r\nHost: pod\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}
