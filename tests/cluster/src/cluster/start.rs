// SPDX-License-Identifier: Apache-2.0

//! The order in which a cluster is started, and what each step waits for.

use std::{fs::DirBuilder, net::Ipv4Addr, os::unix::fs::DirBuilderExt};

use anyhow::{Context, Result};
use kiln_tests::{cgroup::Cgroup, mounts, netns::Netns, process::Cmd};
use kube::Client;

use super::{
    Parts, config, host,
    layout::{FIRST_SERVICE, Layout, NODE},
    network::{self, Network},
    programs::{Lines, Program, REGISTRY},
    ready,
    state::State,
};
use crate::{
    control_plane,
    pki::{Pki, Subject},
};

/// A start under way.
pub(super) struct Start<'a> {
    layout: &'a Layout,
    parts: &'a Parts,
    cgroup: Cgroup,
    state: State,
}

impl<'a> Start<'a> {
    /// Makes what there must be before anything is started.
    pub(super) fn new(layout: &'a Layout, parts: &'a Parts) -> Result<Self> {
        let state = State::new(layout)?;
        mounts::make_shared(&layout.dir)?;
        for dir in layout.dirs() {
            DirBuilder::new()
                .mode(0o711)
                .create(&dir)
                .with_context(|| format!("make {}", dir.display()))?;
        }
        host::enable_controllers(&layout.cgroup)?;
        Ok(Self {
            layout,
            parts,
            cgroup: Cgroup::new(&layout.cgroup)?,
            state,
        })
    }

    /// Starts everything, and waits until Pods can be made. `tell` hears of every step.
    pub(super) async fn all(&mut self, tell: &mut dyn FnMut(&str)) -> Result<()> {
        let network = network::make(self.layout, &mut self.state).await?;
        tell("network");
        certify(self.layout, &network)?;
        config::write(self.layout, self.parts)?;
        tell("certificates and configuration");
        let client = control_plane::client(&self.layout.pki().join("admin.conf")).await?;
        self.servers(&network, &client, tell).await?;
        self.clients(&network, &client, tell).await?;
        self.state.is_complete = true;
        self.state.save(self.layout)
    }

    /// What others cannot do without when they start.
    async fn servers(
        &mut self,
        network: &Network,
        client: &Client,
        tell: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let programs = Lines::new(self.layout, network, self.parts)?;
        for program in [
            programs.etcd(),
            programs.apiserver(),
            programs.images(),
            programs.containerd(),
        ] {
            self.start(&network.netns, &program)?;
        }
        self.until("kube-apiserver", async || ready::is_serving(client).await)
            .await?;
        tell("etcd, kube-apiserver");
        self.until("test images", async || {
            ready::has_listener(&network.netns, REGISTRY)
        })
        .await?;
        let socket = self.layout.containerd_socket();
        self.until("containerd", async || ready::listens(&socket))
            .await?;
        tell("containerd, test images");
        Ok(())
    }

    /// The rest.
    async fn clients(
        &mut self,
        network: &Network,
        client: &Client,
        tell: &mut dyn FnMut(&str),
    ) -> Result<()> {
        host::note(&mut self.state);
        self.state.save(self.layout)?;
        let programs = Lines::new(self.layout, network, self.parts)?;
        for program in [
            programs.controller_manager(),
            programs.scheduler(),
            programs.kubelet(),
            programs.proxy(),
        ] {
            self.start(&network.netns, &program)?;
        }
        if self.parts.handler {
            ready::apply_runtime_class(client).await?;
        }
        self.until("node", async || ready::has_node(client).await)
            .await?;
        tell("kube-controller-manager, kube-scheduler, kubelet, kube-proxy: node is Ready");
        self.until("scheduling", async || ready::takes_pods(client).await)
            .await?;
        tell("Pods can be scheduled");
        Ok(())
    }

    fn start(&mut self, netns: &Netns, program: &Program) -> Result<()> {
        let log = self.layout.log(program.name);
        let mut command = Cmd::new(&program.path)
            .args(&program.args)
            .netns(netns)
            .cgroup(&self.cgroup)
            .dir(&self.layout.dir);
        for (key, value) in &program.envs {
            command = command.env(key, value);
        }
        let pid = command.detached(&log)?;
        self.state.add(program.name, pid);
        self.state.save(self.layout)
    }

    /// Waits until `probe` holds, as long as all that was started runs.
    async fn until(&self, what: &str, probe: impl AsyncFnMut() -> bool) -> Result<()> {
        ready::until(what, probe, || self.state.expect_running(self.layout)).await
    }
}

/// Certificates and kubeconfigs of all that takes part.
fn certify(layout: &Layout, network: &Network) -> Result<()> {
    let dir = layout.pki();
    DirBuilder::new().mode(0o700).create(&dir)?;
    let pki = Pki::new(&dir)?;
    let server = network.server();
    pki.certify(
        "apiserver",
        Subject {
            name: "kube-apiserver",
            group: "kiln",
            dns: &[
                "localhost",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
            ],
            ips: &[
                network.node.into(),
                FIRST_SERVICE.into(),
                Ipv4Addr::LOCALHOST.into(),
            ],
        },
    )?;
    let user = |name, group| Subject {
        name,
        group,
        ..Subject::default()
    };
    pki.certify(
        "apiserver-kubelet",
        user("kube-apiserver-kubelet-client", "system:masters"),
    )?;
    for (file, name, group) in [
        ("admin", "admin", "system:masters"),
        (
            "controller-manager",
            "system:kube-controller-manager",
            "kiln",
        ),
        ("scheduler", "system:kube-scheduler", "kiln"),
        ("proxy", "system:kube-proxy", "kiln"),
    ] {
        pki.kubeconfig(file, user(name, group), &server)?;
    }
    let kubelet = Subject {
        name: &format!("system:node:{NODE}"),
        group: "system:nodes",
        dns: &[NODE],
        ips: &[network.node.into()],
    };
    pki.kubeconfig("kubelet", kubelet, &server)?;
    Ok(())
}
