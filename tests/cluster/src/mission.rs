// SPDX-License-Identifier: Apache-2.0

//! The manifests of Agent Sandbox's documentation, word for word and in its order, on a cluster:
//! a template, a pool of warm sandboxes, a claim that takes one of them, and a Sandbox without a
//! pool; then code in the claimed sandbox, over its HTTP API.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use kiln_tests::wait;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{account::deploy, cluster::Private, system::System};

/// What the agent holds for the Pods of these manifests: those of the template have a limit of
/// memory, which their sandboxes show with the overhead of their class; the other has none.
pub const AGENT: &str = "overhead = 50331648\n[limits]\nboots = 2\n\
    [[class]]\nname = \"gvisor\"\nwarm = 2\nmemory = 1124073472\n\
    [[class]]\nname = \"gvisor\"\nwarm = 1\n";

/// How many sandboxes that is.
const WARM: u32 = 3;

/// How long anything of it may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Who is told what happens.
pub trait Audience {
    /// A new chapter.
    fn chapter(&mut self, title: &str);
    /// A command, and what it printed.
    fn ran(&mut self, command: &str, output: &str);
    /// Something that was seen to hold, and after which time.
    fn holds(&mut self, what: &str, took: Duration);
}

/// The manifests at work.
pub struct Mission<'a> {
    cluster: &'a Private,
    audience: &'a mut dyn Audience,
}

impl<'a> Mission<'a> {
    /// On `cluster`, told to `audience`.
    pub fn new(cluster: &'a Private, audience: &'a mut dyn Audience) -> Self {
        Self { cluster, audience }
    }

    /// All of it, from a cluster that knows nothing of Agent Sandbox to one that has it no more.
    ///
    /// # Errors
    /// What does not hold.
    pub async fn run(mut self) -> Result<()> {
        self.audience.chapter("Agent Sandbox is enabled");
        let start = Instant::now();
        let system = System::enable(self.cluster, AGENT).await?;
        self.audience
            .holds("definitions, rights, controller", start.elapsed());
        let start = Instant::now();
        system.agent.expect_all_ready(WARM).await?;
        let what = format!("the node holds {WARM} sandboxes that are booted already");
        self.audience.holds(&what, start.elapsed());
        self.pool().await?;
        self.claim().await?;
        self.direct().await?;
        self.audience.chapter("What there is now");
        self.kubectl("get sandboxwarmpool,sandboxclaim,sandbox,pod")
            .await?;
        self.until("the node's report", async |m: &Self| {
            let node = m
                .get(&format!("sandboxnode/{}", m.cluster.cluster().node()))
                .await?;
            let ready = node["status"]["total"]["ready"]
                .as_i64()
                .unwrap_or_default();
            Ok(is_ready(&node) && ready >= i64::from(WARM))
        })
        .await?;
        self.kubectl("get sandboxnodes").await?;
        self.all_on_gvisor().await?;
        let adopted = system.agent.adopted().await?;
        ensure!(
            adopted >= u64::from(WARM),
            "{adopted} sandboxes were adopted\n{}",
            system.agent.log()
        );
        let what = format!("{adopted} Pods started in a sandbox that was booted before them");
        self.audience.holds(&what, Duration::ZERO);
        self.code().await?;
        self.audience.chapter("All of it goes again");
        let start = Instant::now();
        for file in [
            "sandbox",
            "sandbox-claim",
            "sandbox-warmpool",
            "sandbox-template",
        ] {
            self.kubectl(&format!("delete --wait -f deploy/examples/{file}.yaml"))
                .await?;
        }
        self.until("no Pod is left", async |m: &Self| {
            let pods = m.get("pods").await?;
            Ok(pods["items"].as_array().is_some_and(Vec::is_empty))
        })
        .await?;
        self.audience.holds("no Pod is left", start.elapsed());
        system.end().await
    }

    async fn pool(&mut self) -> Result<()> {
        self.audience
            .chapter("A template, and a pool of two warm sandboxes");
        let start = Instant::now();
        self.apply("sandbox-template").await?;
        self.apply("sandbox-warmpool").await?;
        self.until("the pool is full", async |m: &Self| {
            let pool = m.get("sandboxwarmpool/python-runtime-warmpool").await?;
            Ok(pool["status"]["readyReplicas"] == 2)
        })
        .await?;
        self.audience
            .holds("the pool has 2 of 2 ready", start.elapsed());
        Ok(())
    }

    async fn claim(&mut self) -> Result<()> {
        self.audience.chapter("A claim takes one of them");
        let before = uids(&self.get("pods").await?);
        let start = Instant::now();
        self.apply("sandbox-claim").await?;
        self.until("the claim is ready", async |m: &Self| {
            Ok(is_ready(&m.get("sandboxclaim/sandbox-claim").await?))
        })
        .await?;
        self.audience.holds("the claim is ready", start.elapsed());
        let claim = self.get("sandboxclaim/sandbox-claim").await?;
        let pod = self.claimed_pod().await?;
        let (made, ran) = (
            time(&claim["metadata"]["creationTimestamp"])?,
            time(&pod["status"]["startTime"])?,
        );
        // Times are of whole seconds, and both may be of the same.
        ensure!(
            before.contains(pod["metadata"]["uid"].as_str().context("no uid")?),
            "the Pod has run since {ran}, the claim is of {made}"
        );
        let ahead = made.duration_since(ran).as_millis();
        let what = format!("its Pod ran {} s before the claim", ahead / 1000);
        self.audience.holds(&what, Duration::ZERO);
        self.until("the pool is full again", async |m: &Self| {
            let pool = m.get("sandboxwarmpool/python-runtime-warmpool").await?;
            Ok(pool["status"]["readyReplicas"] == 2)
        })
        .await?;
        self.audience
            .holds("the pool has 2 of 2 ready again", start.elapsed());
        Ok(())
    }

    async fn direct(&mut self) -> Result<()> {
        self.audience.chapter("A Sandbox of its own");
        let start = Instant::now();
        self.apply("sandbox").await?;
        self.until("the Sandbox is ready", async |m: &Self| {
            Ok(is_ready(&m.get("sandbox/sandbox-example-2").await?))
        })
        .await?;
        self.audience.holds("the Sandbox is ready", start.elapsed());
        Ok(())
    }

    /// Every Pod sees gVisor's kernel.
    async fn all_on_gvisor(&mut self) -> Result<()> {
        self.until("four Pods that run and are ready", async |m: &Self| {
            let pods = m.get("pods").await?;
            let pods = pods["items"].as_array().context("no list of Pods")?;
            let runs = |pod: &Value| pod["status"]["phase"] == "Running" && is_ready(pod);
            Ok(pods.len() == 4 && pods.iter().all(runs))
        })
        .await?;
        let pods = self.get("pods").await?;
        let pods = pods["items"].as_array().context("no list of Pods")?;
        for pod in pods {
            let name = pod["metadata"]["name"]
                .as_str()
                .context("a Pod without a name")?;
            let log = self
                .cluster
                .kubectl(["exec", name, "--", "dmesg"])?
                .run()
                .await?;
            ensure!(log.contains("Starting gVisor"), "{name}: {log}");
        }
        self.audience
            .holds("every Pod runs on gVisor", Duration::ZERO);
        Ok(())
    }

    /// Code in the claimed sandbox, as an agent would run it.
    async fn code(&mut self) -> Result<()> {
        self.audience.chapter("Code in the claimed sandbox");
        let pod = self.claimed_pod().await?;
        let name = pod["metadata"]["name"]
            .as_str()
            .context("a Pod without a name")?;
        let log = self.cluster.dir().join("forward.log");
        let forward = self
            .cluster
            .kubectl(["port-forward", &format!("pod/{name}"), ":8888"])?;
        let forward = forward.background(&log)?;
        let said = forward.expect("Forwarding from 127.0.0.1:").await?;
        let mut words = said.split_whitespace();
        let address = words
            .find(|w| w.starts_with("127.0.0.1:"))
            .context("no address")?;
        let program =
            "import platform, sys; print(sys.version.split()[0], sum(range(10)), platform.node())";
        let body = serde_json::json!({"command": format!("python3 -c '{program}'")}).to_string();
        let start = Instant::now();
        let answer = post(address, "/execute", &body).await?;
        self.audience.ran(
            &format!("curl -d '{body}' http://SANDBOX:8888/execute"),
            &answer,
        );
        let answer: Value = serde_json::from_str(&answer)?;
        let output = answer["stdout"].as_str().unwrap_or_default();
        ensure!(
            answer["exit_code"] == 0 && output.contains(" 45 "),
            "{answer}"
        );
        self.audience.holds("the code has run", start.elapsed());
        Ok(())
    }

    async fn claimed_pod(&self) -> Result<Value> {
        let claim = self.get("sandboxclaim/sandbox-claim").await?;
        let name = claim["status"]["sandbox"]["name"].as_str();
        let sandbox = self
            .get(&format!("sandbox/{}", name.context("no Sandbox is named")?))
            .await?;
        let noted = &sandbox["metadata"]["annotations"]["agents.x-k8s.io/pod-name"];
        let pod = noted.as_str().or(name).context("no Pod")?;
        self.get(&format!("pod/{pod}")).await
    }

    async fn apply(&mut self, file: &str) -> Result<()> {
        self.kubectl(&format!("apply -f deploy/examples/{file}.yaml"))
            .await
    }

    async fn kubectl(&mut self, words: &str) -> Result<()> {
        let root = deploy().join("..");
        let output = self
            .cluster
            .kubectl(words.split_whitespace())?
            .dir(&root)
            .run()
            .await?;
        self.audience.ran(&format!("kubectl {words}"), &output);
        Ok(())
    }

    async fn get(&self, what: &str) -> Result<Value> {
        let text = self.cluster.kubectl(["get", what, "-ojson"])?.run().await?;
        Ok(serde_json::from_str(&text)?)
    }

    async fn until(&self, what: &str, holds: impl AsyncFn(&Self) -> Result<bool>) -> Result<()> {
        let mut last = None;
        let seen = wait::until(what, PATIENCE, async || match holds(self).await {
            Ok(true) => Some(()),
            Ok(false) => None,
            Err(e) => {
                last = Some(e);
                None
            }
        });
        if let Err(e) = seen.await {
            let all = self
                .cluster
                .kubectl(["get", "sandboxwarmpool,sandboxclaim,sandbox,pod,events"])?;
            let all = all.run().await.unwrap_or_else(|e| e.to_string());
            return Err(e.context(format!("{last:?}\n{all}\n{}", self.cluster.log())));
        }
        Ok(())
    }
}

fn is_ready(object: &Value) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    let mut all = conditions.into_iter().flatten();
    all.any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// The uids of the objects of a list.
fn uids(list: &Value) -> BTreeSet<String> {
    let items = list["items"].as_array().into_iter().flatten();
    let uids = items.filter_map(|item| item["metadata"]["uid"].as_str());
    uids.map(str::to_owned).collect()
}

fn time(value: &Value) -> Result<Timestamp> {
    Ok(value.as_str().context("no time")?.parse()?)
}

/// Posts JSON to a server, and returns the body of its answer.
async fn post(address: &str, path: &str, body: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: sandbox\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(body.to_owned())
}
