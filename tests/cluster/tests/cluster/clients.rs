// SPDX-License-Identifier: Apache-2.0

//! Upstream's Python clients, as they are published, from the claim to its end: to sandboxes in
//! gVisor, in the ways that the clients have.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kiln_cluster::{
    account::{NAMESPACE, deploy},
    python,
    system::System,
};
use kiln_tests::{tools, wait};
use serde_json::{Value, json};

use crate::env::{Env, NOTHING_WARM};

/// A version of those that `tests/deps/install.sh` installs, and which of its two clients.
type Client = (&'static str, &'static str);

const OF_TEMPLATES: Client = ("0.4.6", "blocking");
const OF_POOLS: [Client; 2] = [("0.5.6", "blocking"), ("1.0.8", "blocking")];
const ASYNC: Client = ("1.0.8", "async");

const POOL: &str = "python-pool";
const TEMPLATE: &str = "python-template";

/// The router's port.
const PORT: u16 = 8080;

/// How long one life may take.
const LIFE: Duration = Duration::from_secs(600);

/// Label of every sandbox's Pod.
const SANDBOX: &str = "agents.x-k8s.io/sandbox-name-hash";

const MANIFESTS: &str = "apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxTemplate
metadata: {name: python-template}
spec:
  podTemplate:
    spec:
      runtimeClassName: gvisor
      containers:
      - name: runtime
        image: registry.k8s.io/agent-sandbox/python-runtime-sandbox:v0.1.0
        ports: [{containerPort: 8888}]
        readinessProbe: {httpGet: {path: /, port: 8888}, periodSeconds: 1}
        resources: {requests: {cpu: 20m, memory: 64Mi}, limits: {cpu: \"1\", memory: 512Mi}}
---
apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxWarmPool
metadata: {name: python-pool}
spec: {replicas: 1, sandboxTemplateRef: {name: python-template}}
";

pub(crate) async fn upstreams_work_unmodified(env: &Env) -> Result<()> {
    let system = System::enable(&env.private, NOTHING_WARM).await?;
    let ns = env.namespace().await?;
    ns.apply(MANIFESTS).await?;
    let router = Router::start(env).await?;
    for client in OF_POOLS.into_iter().chain([OF_TEMPLATES, ASYNC]) {
        live(env, client, &ns.name, "pod").await?;
        live(env, client, &ns.name, &router.url()).await?;
    }
    for client in OF_POOLS {
        live(env, client, &ns.name, "tunnel").await?;
    }
    // It looks for the router beside its claims.
    let beside = env.existing(NAMESPACE);
    beside.apply(MANIFESTS).await?;
    live(env, OF_TEMPLATES, NAMESPACE, "tunnel").await?;
    router.refuses_others(env).await?;
    for ns in [&ns, &beside] {
        let gone = [
            "delete",
            "--wait",
            "sandboxwarmpool,sandboxtemplate",
            "--all",
        ];
        ns.kubectl(gone).await?;
        let pods = [
            "wait",
            "--for=delete",
            "--timeout=50s",
            "pods",
            "-l",
            SANDBOX,
        ];
        ns.kubectl(pods).await?;
    }
    router.stop(env).await?;
    system.end().await
}

/// Has a client make, use and end a sandbox in `namespace`.
async fn live(env: &Env, (version, kind): Client, namespace: &str, way: &str) -> Result<()> {
    // What a Pod without a warm one costs is not to be the client's patience.
    let (pool, ready) = (format!("sandboxwarmpool/{POOL}"), ".status.readyReplicas");
    env.existing(namespace)
        .until_field(&pool, ready, |n| n == "1")
        .await?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/client_life.py");
    let (kubeconfig, home) = (env.private.cluster().kubeconfig(), env.private.dir());
    let mut command = python::client(version, &script, &kubeconfig, home)?
        .args([namespace, POOL, TEMPLATE, way, kind])
        .deadline(LIFE);
    if way != "tunnel" {
        // Only there are Pods and services.
        command = command.netns(&env.private.cluster().netns()?);
    }
    let lived = command.run().await.map(drop);
    lived.with_context(|| format!("{kind} client {version}, by {way}"))
}

/// The router, with its manifest.
struct Router {
    /// Of its Service.
    address: String,
}

impl Router {
    async fn start(env: &Env) -> Result<Self> {
        let file = env.private.dir().join("kiln-router");
        fs::copy(tools::router()?, &file)?;
        let manifest = fs::read_to_string(deploy().join("base/router.yaml"))?;
        let mut objects: Vec<Value> = serde_saphyr::from_multiple(&manifest)?;
        for object in &mut objects {
            if object["kind"] == "Deployment" {
                run_file(object, &file);
            }
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let ns = env.existing(NAMESPACE);
        ns.apply(&list.to_string()).await?;
        let deployment = "deployment/sandbox-router-deployment";
        let ready = ns.kubectl(["rollout", "status", deployment, "--timeout=50s"]);
        if let Err(e) = ready.await {
            let why = ns
                .kubectl(["describe", "pods", "-lapp=sandbox-router"])
                .await?;
            return Err(e.context(why));
        }
        let address = ns
            .field("service/sandbox-router-svc", ".spec.clusterIP")
            .await?;
        Ok(Self { address })
    }

    fn url(&self) -> String {
        format!("http://{}:{PORT}", self.address)
    }

    /// Neither the node's kubelet, nor the router itself, nor the apiserver.
    async fn refuses_others(&self, env: &Env) -> Result<()> {
        let own = env.existing(NAMESPACE);
        let status = |object: &str| format!("-ojsonpath={{.items[0].status.{object}}}");
        let node = ["get", "nodes", &status("addresses[0].address")];
        let pod = ["get", "pods", "-lapp=sandbox-router", &status("podIP")];
        let (node, pod) = (own.kubectl(node).await?, own.kubectl(pod).await?);
        let service = [
            "get",
            "-ndefault",
            "service/kubernetes",
            "-ojsonpath={.spec.clusterIP}",
        ];
        let service = own.kubectl(service).await?;
        for (address, port) in [(node, 10250), (pod, 8081), (service, 443)] {
            let answer = self.ask(env, &address, port)?;
            ensure!(
                answer.starts_with("HTTP/1.1 400 ") && answer.contains("Invalid target"),
                "{address}: {answer}"
            );
        }
        Ok(())
    }

    /// The answer to a request for what is at `address`.
    fn ask(&self, env: &Env, address: &str, port: u16) -> Result<String> {
        let request = format!(
            "GET / HTTP/1.1\r\nHost: router\r\nX-Sandbox-ID: any\r\nX-Sandbox-Pod-IP: {address}\r\n\
             X-Sandbox-Port: {port}\r\nConnection: close\r\n\r\n"
        );
        env.private.cluster().netns()?.run(|| {
            let mut stream = TcpStream::connect((self.address.as_str(), PORT))?;
            stream.set_read_timeout(Some(wait::SOON))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    }

    async fn stop(&self, env: &Env) -> Result<()> {
        let ns = env.existing(NAMESPACE);
        let all = "deployment,service,networkpolicy";
        let gone = ["delete", "--wait", all, "-lapp=sandbox-router"];
        ns.kubectl(gone).await.map(drop)
    }
}

/// Has a Deployment run a file of the node, once, and not an image that nobody has made.
fn run_file(deployment: &mut Value, file: &Path) {
    deployment["spec"]["replicas"] = json!(1);
    let pod = &mut deployment["spec"]["template"]["spec"];
    pod["volumes"] = json!([{"name": "router", "hostPath": {"path": file, "type": "File"}}]);
    let container = &mut pod["containers"][0];
    container["image"] = json!("busybox:1");
    container["command"] = json!(["/kiln-router"]);
    container["volumeMounts"] =
        json!([{"name": "router", "mountPath": "/kiln-router", "readOnly": true}]);
}
