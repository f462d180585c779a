// SPDX-License-Identifier: Apache-2.0

//! etcd, kube-apiserver, and those of kube-controller-manager's controllers that tests need.
//!
//! No kubelet and no scheduler: [`crate::standin`] takes their place. Everything is in one
//! [`Place`], which takes it away however the test ends.

use std::{
    fs::DirBuilder,
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use k8s_openapi::{
    api::core::v1::Namespace,
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kiln_tests::{
    place::Place,
    process::{Background, Cmd},
    tools, wait,
};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use nix::mount::MsFlags;
use serde_json::json;
use tokio::sync::Mutex;

use crate::{
    account,
    pki::{Pki, Subject},
};

/// How long the apiserver may take to serve: it migrates nothing, but machines are slow.
const STARTS: Duration = Duration::from_secs(180);
/// Where services would be.
const SERVICES: &str = "10.0.0.0/24";

/// A control plane.
pub struct ControlPlane {
    place: Place,
    client: Client,
    kubeconfig: PathBuf,
    port: u16,
    etcd_port: u16,
    pki: Pki,
    apiserver: Mutex<Option<Background>>,
    others: Vec<Background>,
}

impl ControlPlane {
    /// Starts one, with our kinds in it.
    ///
    /// # Errors
    /// When something does not come up; with the end of its log.
    pub async fn start() -> Result<Self> {
        let mut plane = Self::with_apiserver().await?;
        // The garbage collector looks for kinds when it starts, and then every 30 seconds.
        plane.install_definitions().await?;
        plane.others.push(plane.start_controller_manager()?);
        Ok(plane)
    }

    /// Starts one with nothing in it.
    ///
    /// # Errors
    /// When something does not come up; with the end of its log.
    pub async fn bare() -> Result<Self> {
        let mut plane = Self::with_apiserver().await?;
        plane.others.push(plane.start_controller_manager()?);
        Ok(plane)
    }

    async fn with_apiserver() -> Result<Self> {
        let place = Place::new()?;
        let pki = Pki::new(&place.dir().join("pki"))?;
        let [port, etcd_port, peer_port] = free_ports()?;
        let server = format!("https://127.0.0.1:{port}");
        let masters = Subject {
            name: "admin",
            group: "system:masters",
            ..Subject::default()
        };
        let kubeconfig = pki.kubeconfig("admin", masters, &server)?;
        pki.certify(
            "apiserver",
            Subject {
                name: "kube-apiserver",
                group: "kiln",
                dns: &["localhost", "kubernetes.default.svc"],
                ips: &[Ipv4Addr::LOCALHOST.into()],
            },
        )?;
        let etcd = start_etcd(&place, etcd_port, peer_port)?;
        let plane = Self {
            client: client(&kubeconfig).await?,
            place,
            kubeconfig,
            port,
            etcd_port,
            pki,
            apiserver: Mutex::new(None),
            others: vec![etcd],
        };
        plane.start_apiserver().await?;
        Ok(plane)
    }

    /// A client with all rights.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// A kubeconfig with all rights.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A kubeconfig with the rights of the controller's ServiceAccount, which is made if need be.
    ///
    /// # Errors
    /// When kubectl fails.
    pub async fn account(&self) -> Result<PathBuf> {
        let rights = account::rights();
        let apply = ["apply", "--server-side", "--force-conflicts"];
        let rights = rights.iter().map(String::as_str);
        self.kubectl(&apply.into_iter().chain(rights).collect::<Vec<_>>())
            .await?;
        let kubectl = async |args: &[&str]| self.kubectl(args).await;
        account::kubeconfig(kubectl, self.dir(), account::CONTROLLER, &[]).await
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.place.dir()
    }

    /// Where it keeps its processes.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Makes a namespace of a name that begins with `prefix`, and returns the name.
    ///
    /// # Errors
    /// The apiserver's.
    pub async fn namespace(&self, prefix: &str) -> Result<String> {
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"generateName": format!("{prefix}-")}}))?;
        let api: Api<Namespace> = Api::all(self.client());
        let made = api.create(&PostParams::default(), &namespace).await?;
        made.metadata.name.context("a namespace without a name")
    }

    /// Runs kubectl, and returns what it says.
    ///
    /// # Errors
    /// When it fails; with its message.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_with(args, "").await
    }

    /// Runs kubectl with something to read.
    ///
    /// # Errors
    /// When it fails; with its message.
    pub async fn kubectl_with(&self, args: &[&str], input: &str) -> Result<String> {
        Cmd::new(&tools::program("kubectl")?)
            .args(args)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", self.dir())
            .input(input.as_bytes())
            .run()
            .await
    }

    /// Kills the apiserver and starts it again.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart_apiserver(&self) -> Result<()> {
        // Dropping it kills it; the port is free when it is gone.
        drop(self.apiserver.lock().await.take());
        wait::until_true("the port to be free", wait::SOON, || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).is_ok()
        })
        .await?;
        self.start_apiserver().await
    }

    async fn start_apiserver(&self) -> Result<()> {
        let file = |name, kind| self.pki.path(name, kind).display().to_string();
        let args = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.port),
            format!("--tls-cert-file={}", file("apiserver", "crt")),
            format!("--tls-private-key-file={}", file("apiserver", "key")),
            format!("--client-ca-file={}", file("ca", "crt")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("sa", "pub")),
            format!("--service-account-signing-key-file={}", file("sa", "key")),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--authorization-mode=RBAC".to_owned(),
            // As clusters have it; who may is for admission to say.
            "--allow-privileged=true".to_owned(),
            // As OpenShift has it: who sets an owner may delete what is owned.
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement".to_owned(),
            // Nobody makes service accounts here.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
        ];
        let log = self.dir().join("kube-apiserver.log");
        let started = Cmd::new(&tools::program("kube-apiserver")?)
            .args(args)
            .cgroup(self.place.cgroup())
            .background(&log)?;
        let ready = wait::until("the apiserver", STARTS, async || {
            let namespaces: Api<Namespace> = Api::all(self.client());
            namespaces.get("default").await.ok()
        });
        ready.await.with_context(|| tail(&started.text()))?;
        *self.apiserver.lock().await = Some(started);
        Ok(())
    }

    fn start_controller_manager(&self) -> Result<Background> {
        let controllers = "namespace-controller,garbage-collector-controller,\
                           persistentvolumeclaim-protection-controller,\
                           resourcequota-controller,deployment-controller,\
                           replicaset-controller,daemonset-controller,\
                           validatingadmissionpolicy-status-controller";
        let [port] = free_ports()?;
        let args = [
            format!("--kubeconfig={}", self.kubeconfig.display()),
            format!("--controllers={controllers}"),
            "--leader-elect=false".to_owned(),
            "--kube-api-qps=500".to_owned(),
            "--kube-api-burst=1000".to_owned(),
            format!("--secure-port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", self.dir().join("kcm").display()),
        ];
        Cmd::new(&tools::program("kube-controller-manager")?)
            .args(args)
            .cgroup(self.place.cgroup())
            .background(&self.dir().join("kube-controller-manager.log"))
    }

    /// Applies our definitions, and waits until they are served.
    async fn install_definitions(&self) -> Result<()> {
        let api: Api<CustomResourceDefinition> = Api::all(self.client());
        let params = PatchParams::apply("kiln-tests").force();
        for manifest in kiln_crds::manifests() {
            let name = manifest.definition["metadata"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            let patch = Patch::Apply(&manifest.definition);
            api.patch(&name, &params, &patch)
                .await
                .with_context(|| format!("apply {name}"))?;
            wait::until(&name, wait::SOON, async || {
                let found = api.get(&name).await.ok()?;
                let conditions = found.status?.conditions?;
                conditions
                    .iter()
                    .any(|c| c.type_ == "Established" && c.status == "True")
                    .then_some(())
            })
            .await?;
        }
        Ok(())
    }

    /// Ends it.
    ///
    /// # Errors
    /// What stays.
    pub fn stop(self) -> Result<()> {
        self.place.destroy()
    }
}

fn start_etcd(place: &Place, port: u16, peer_port: u16) -> Result<Background> {
    let (client, peer) = (
        format!("http://127.0.0.1:{port}"),
        format!("http://127.0.0.1:{peer_port}"),
    );
    let data = place.dir().join("etcd");
    in_memory(&data)?;
    let args = [
        format!("--data-dir={}", data.display()),
        "--unsafe-no-fsync".to_owned(),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        "--log-level=warn".to_owned(),
    ];
    Cmd::new(&tools::program("etcd")?)
        .args(args)
        .cgroup(place.cgroup())
        .background(&place.dir().join("etcd.log"))
}

/// Makes a directory of a file system in memory: without waiting for a disk to be written, etcd
/// still waits where others have the disk write. It goes with the place that it is in.
fn in_memory(dir: &Path) -> Result<()> {
    // etcd wants it for itself.
    DirBuilder::new().mode(0o700).create(dir)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let options = Some("size=1g,mode=0700");
    nix::mount::mount(Some("etcd"), dir, Some("tmpfs"), flags, options)
        .with_context(|| format!("mount {}", dir.display()))
}

/// A client by a kubeconfig.
///
/// # Errors
/// When the file makes no sense.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Ports of the loopback interface that nobody uses.
///
/// # Errors
/// When there is none.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    // All are held until all are known, so that no two are the same.
    let mut held = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a port")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
