// SPDX-License-Identifier: Apache-2.0

//! Proxies between `kilnctl` and the apiserver. Whatever leads there leads kubectl there too.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use anyhow::{Context, Result, ensure};
use kiln_tests::tools;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::env::{Env, fails, program, run};

/// A name that only the proxy knows, and no DNS (RFC 6761).
const SERVER: &str = "k8s.invalid";

/// A proxy that leads everybody to the same port of this machine.
struct Proxy {
    url: String,
    used: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Proxy {
    async fn start(port: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let used = Arc::new(AtomicUsize::new(0));
        let counted = used.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counted.fetch_add(1, Relaxed);
                // A client that goes away ends only its own connection.
                tokio::spawn(async move { tunnel(client, port).await.ok() });
            }
        });
        Ok(Self { url, used, task })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers one CONNECT (RFC 9110, section 9.3.6).
async fn tunnel(mut client: TcpStream, port: u16) -> Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    ensure!(head.starts_with(b"CONNECT k8s.invalid:"), "another server");
    let mut server = TcpStream::connect(("127.0.0.1", port)).await?;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

/// A kubeconfig that calls the apiserver by [`SERVER`], and its port.
fn kubeconfig(env: &Env, name: &str, proxy: Option<&str>) -> Result<(PathBuf, u16)> {
    let mut config: Value = serde_json::from_slice(&fs::read(env.plane.kubeconfig())?)?;
    let cluster = config
        .pointer_mut("/clusters/0/cluster")
        .context("no cluster")?;
    let server = cluster["server"].as_str().context("no server")?.to_owned();
    let (_, port) = server.rsplit_once(':').context("no port")?;
    cluster["server"] = json!(format!("https://{SERVER}:{port}"));
    cluster["tls-server-name"] = json!("127.0.0.1");
    if let Some(proxy) = proxy {
        cluster["proxy-url"] = json!(proxy);
    }
    let path = env.plane.dir().join(name);
    fs::write(&path, config.to_string())?;
    Ok((path, port.trim_end_matches('/').parse()?))
}

pub(crate) async fn the_apiserver_is_reached_as_kubectl_reaches_it(env: &Env) -> Result<()> {
    let (named, port) = kubeconfig(env, "named.conf", None)?;
    let proxy = Proxy::start(port).await?;
    let (proxied, _) = kubeconfig(env, "proxied.conf", Some(&proxy.url))?;
    let here = env.plane.kubeconfig().to_owned();
    let kubectl = tools::program("kubectl")?;
    let variable = ("HTTPS_PROXY", proxy.url.as_str());
    // Port 9 has nobody who answers.
    let away = ("HTTPS_PROXY", "http://127.0.0.1:9");
    for (kubeconfig, variables, is_reached, by_proxy) in [
        (&proxied, &[][..], true, true),
        (&proxied, &[away, ("NO_PROXY", SERVER)], true, true),
        (&named, &[variable], true, true),
        (
            &named,
            &[variable, ("NO_PROXY", "127.0.0.1,.svc")],
            true,
            true,
        ),
        (&named, &[variable, ("NO_PROXY", SERVER)], false, false),
        (&named, &[away], false, false),
        (&here, &[away], true, false),
        (&here, &[away, ("NO_PROXY", "127.0.0.0/8")], true, false),
    ] {
        let case = format!("{} {variables:?}", kubeconfig.display());
        for (program, words) in [
            (&kubectl, "get --raw /version"),
            (&program()?, "status -o value"),
        ] {
            let before = proxy.used.load(Relaxed);
            let output = run(program, kubeconfig, variables, words).await?;
            let case = || format!("{} {case}: {}", program.display(), output.errors());
            let is_used = proxy.used.load(Relaxed) > before;
            ensure!(is_used == by_proxy, "{}", case());
            if *program == kubectl {
                ensure!(output.status.success() == is_reached, "{}", case());
            } else if is_reached {
                ensure!(output.text() == "False\n", "{}", case());
            } else {
                fails(&output, &["does not answer"]).with_context(case)?;
            }
        }
    }
    Ok(())
}
