// SPDX-License-Identifier: Apache-2.0

//! The command line of every program of a cluster.
//!
//! Ports are the usual ones: they are in a network namespace of the cluster's own.

use std::{
    env,
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use anyhow::Result;
use kiln_tests::tools;

use super::{
    Parts,
    layout::{Layout, NODE, SERVICES},
    network::Network,
};

/// Where test images are served, in the network namespace.
pub(super) const REGISTRY: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 5000);

const ETCD: &str = "http://127.0.0.1:2379";
const ETCD_PEER: &str = "http://127.0.0.1:2380";

/// What is to be run.
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) path: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) envs: Vec<(&'static str, OsString)>,
}

/// Makes command lines.
pub(super) struct Lines<'a> {
    layout: &'a Layout,
    network: &'a Network,
    parts: &'a Parts,
    bin: PathBuf,
    containerd: PathBuf,
}

impl<'a> Lines<'a> {
    pub(super) fn new(layout: &'a Layout, network: &'a Network, parts: &'a Parts) -> Result<Self> {
        let kubelet = tools::program("kubelet")?;
        Ok(Self {
            layout,
            network,
            parts,
            bin: kubelet.with_file_name(""),
            containerd: tools::program("containerd")?,
        })
    }

    pub(super) fn etcd(&self) -> Program {
        let args = [
            ("data-dir", self.at("etcd")),
            ("unsafe-no-fsync", "true".to_owned()),
            ("listen-client-urls", ETCD.to_owned()),
            ("advertise-client-urls", ETCD.to_owned()),
            ("listen-peer-urls", ETCD_PEER.to_owned()),
            ("initial-advertise-peer-urls", ETCD_PEER.to_owned()),
            ("initial-cluster", format!("default={ETCD_PEER}")),
            ("log-level", "warn".to_owned()),
        ];
        self.kubernetes("etcd", args)
    }

    pub(super) fn apiserver(&self) -> Program {
        let args = [
            ("etcd-servers", ETCD.to_owned()),
            ("advertise-address", self.network.node.to_string()),
            ("bind-address", "0.0.0.0".to_owned()),
            ("secure-port", "6443".to_owned()),
            ("tls-cert-file", self.pki("apiserver.crt")),
            ("tls-private-key-file", self.pki("apiserver.key")),
            ("client-ca-file", self.pki("ca.crt")),
            (
                "kubelet-client-certificate",
                self.pki("apiserver-kubelet.crt"),
            ),
            ("kubelet-client-key", self.pki("apiserver-kubelet.key")),
            ("kubelet-certificate-authority", self.pki("ca.crt")),
            // The node's name is known to nobody.
            ("kubelet-preferred-address-types", "InternalIP".to_owned()),
            (
                "service-account-issuer",
                "https://kubernetes.default.svc".to_owned(),
            ),
            ("service-account-key-file", self.pki("sa.pub")),
            ("service-account-signing-key-file", self.pki("sa.key")),
            ("service-cluster-ip-range", SERVICES.to_owned()),
            ("authorization-mode", "Node,RBAC".to_owned()),
            ("enable-admission-plugins", "NodeRestriction".to_owned()),
            ("allow-privileged", "true".to_owned()),
        ];
        self.kubernetes("kube-apiserver", args)
    }

    pub(super) fn controller_manager(&self) -> Program {
        let config = self.pki("controller-manager.conf");
        let args = [
            ("kubeconfig", config.clone()),
            ("authentication-kubeconfig", config.clone()),
            ("authorization-kubeconfig", config),
            ("bind-address", "127.0.0.1".to_owned()),
            ("leader-elect", "false".to_owned()),
            ("use-service-account-credentials", "true".to_owned()),
            // It asks for a token for each of its controllers when it starts.
            ("kube-api-qps", "200".to_owned()),
            ("kube-api-burst", "400".to_owned()),
            ("root-ca-file", self.pki("ca.crt")),
            ("service-account-private-key-file", self.pki("sa.key")),
            ("cluster-signing-cert-file", self.pki("ca.crt")),
            ("cluster-signing-key-file", self.pki("ca.key")),
            ("service-cluster-ip-range", SERVICES.to_owned()),
        ];
        self.kubernetes("kube-controller-manager", args)
    }

    pub(super) fn scheduler(&self) -> Program {
        let config = self.pki("scheduler.conf");
        let args = [
            ("kubeconfig", config.clone()),
            ("authentication-kubeconfig", config.clone()),
            ("authorization-kubeconfig", config),
            ("bind-address", "127.0.0.1".to_owned()),
            ("leader-elect", "false".to_owned()),
        ];
        self.kubernetes("kube-scheduler", args)
    }

    pub(super) fn kubelet(&self) -> Program {
        // Which a node's agent sets elsewhere, when the node has the handler.
        let label = if self.parts.handler {
            "kiln.dev/gvisor=ready"
        } else {
            ""
        };
        let args = [
            ("config", self.at("etc/kubelet.json")),
            ("kubeconfig", self.pki("kubelet.conf")),
            ("root-dir", self.at("kubelet")),
            ("cert-dir", self.at("kubelet/pki")),
            ("hostname-override", NODE.to_owned()),
            ("node-ip", self.network.node.to_string()),
            ("node-labels", label.to_owned()),
        ];
        self.kubernetes("kubelet", args)
    }

    pub(super) fn proxy(&self) -> Program {
        self.kubernetes("kube-proxy", [("config", self.at("etc/kube-proxy.json"))])
    }

    pub(super) fn containerd(&self) -> Program {
        let args = [("config", self.at("etc/containerd.toml"))];
        self.program("containerd", self.containerd.clone(), flags(args))
    }

    pub(super) fn images(&self) -> Program {
        let mut args = vec!["serve-images".to_owned()];
        args.extend(flags([
            ("guest", self.parts.guest.display().to_string()),
            ("listen", REGISTRY.to_string()),
        ]));
        self.program("test-images", self.parts.images.clone(), args)
    }

    fn kubernetes<const N: usize>(&self, name: &'static str, args: [(&str, String); N]) -> Program {
        self.program(name, self.bin.join(name), flags(args))
    }

    fn program(&self, name: &'static str, path: PathBuf, args: Vec<String>) -> Program {
        let mut search = self.layout.bin().into_os_string();
        search.push(":");
        search.push(env::var_os("PATH").unwrap_or_default());
        // Where a login shell of root finds iptables.
        search.push(":/usr/sbin:/sbin");
        let envs = vec![
            ("PATH", search),
            ("TMPDIR", self.layout.dir.clone().into()),
            // The user's proxy does not know the way to this cluster.
            ("NO_PROXY", "*".into()),
            ("no_proxy", "*".into()),
        ];
        Program {
            name,
            path,
            args,
            envs,
        }
    }

    fn at(&self, name: &str) -> String {
        self.layout.at(name).display().to_string()
    }

    fn pki(&self, name: &str) -> String {
        self.layout.pki().join(name).display().to_string()
    }
}

fn flags<const N: usize>(flags: [(&str, String); N]) -> Vec<String> {
    let flags = flags.into_iter();
    flags
        .map(|(flag, value)| format!("--{flag}={value}"))
        .collect()
}
