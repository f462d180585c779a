// SPDX-License-Identifier: Apache-2.0

//! The OCI bundle: what the shim reads from `config.json`, what it refuses in it, and what it
//! changes before the runtime sees it.
//!
//! The image, the Pod and its annotations are hostile. A spec is edited as a JSON value, so that
//! keys this code does not know reach the runtime untouched.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use kiln_agent_api::Policy;
use kiln_host::{
    cgroup::{Cgroup, Limits, PERIOD_US},
    fs::write_atomically,
    oom,
};
use runsc_wrapper::{ContainerId, is_bind};
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    io::read_capped,
    masks, paths,
};

/// Largest `config.json` that is read: Kubernetes' own limit of an object is 1.5 MiB.
const MAX_SPEC: u64 = 8 << 20;

/// Annotations of containerd's CRI plugin (containerd `internal/cri/annotations`).
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
const SANDBOX_LOG_DIR: &str = "io.kubernetes.cri.sandbox-log-directory";
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const SANDBOX_CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// Names a checkpoint image below one of the node's `restore_dirs` to start a container from.
const RESTORE_IMAGE: &str = "kiln.dev/restore-image";

/// Names the PodSnapshot that a Pod is to be restored from, in the Pod's namespace.
const RESTORE_SNAPSHOT: &str = "kiln.dev/restore-snapshot";

/// What a container is to its sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It is the first of its sandbox: a Pod's, or a container of its own.
    Sandbox,
    /// It joins the sandbox with this id.
    Member(ContainerId),
}

/// The network that the spec asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The host's own.
    Host,
    /// The network namespace mounted at this path.
    Netns(PathBuf),
    /// A new and empty namespace that the runtime makes.
    New,
}

impl Network {
    /// Refuses the host's own network under another name, such as a link to it. Blocks.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for that. What is not there is for the runtime to refuse.
    pub fn check(&self) -> Result<()> {
        let Self::Netns(path) = self else {
            return Ok(());
        };
        // A namespace is known by device and inode (namespaces(7)).
        let file = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let host = file(Path::new("/proc/self/ns/net"));
        if host.is_some() && file(path) == host {
            let words = format!("{} is the host's network namespace", path.display());
            return Err(Error::InvalidArgument(words));
        }
        Ok(())
    }
}

/// An OCI spec.
#[derive(Debug, Clone)]
pub struct Spec(Value);

impl Spec {
    /// Reads `config.json` of `bundle`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when it is too large or no JSON object.
    pub fn load(bundle: &Path) -> Result<Self> {
        Self::parse(&read_capped(&bundle.join("config.json"), MAX_SPEC)?)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when it is no JSON object.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let bad = |e: &dyn std::fmt::Display| Error::InvalidArgument(format!("config.json: {e}"));
        let value: Value = serde_json::from_slice(text).map_err(|e| bad(&e))?;
        // What is edited below these paths must be editable.
        for path in [
            "",
            "/linux",
            "/linux/resources",
            "/linux/resources/memory",
            "/linux/resources/cpu",
        ] {
            let object = value
                .pointer(path)
                .is_none_or(|v| v.is_object() || (v.is_null() && !path.is_empty()));
            if !object {
                return Err(bad(&format!("{path:?} is not an object")));
            }
        }
        Ok(Self(value))
    }

    /// Replaces `config.json` of `bundle` in one step.
    pub fn save(&self, bundle: &Path) -> Result<()> {
        {
            let path = bundle.join("config.json");
            write_atomically(&path, self.0.to_string().as_bytes())
                .map_err(Error::io("write", &path))
        }
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.0.get("annotations")?.get(key)?.as_str()
    }

    /// What the container is to its sandbox: CRI says it by annotations, a plain `ctr run` not
    /// at all.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a member without a sandbox id.
    pub fn role(&self) -> Result<Role> {
        if self.annotation(CONTAINER_TYPE) != Some("container") {
            return Ok(Role::Sandbox);
        }
        match self.annotation(SANDBOX_ID) {
            Some(id) => Ok(Role::Member(id.parse()?)),
            None => Err(Error::InvalidArgument(format!(
                "annotation {SANDBOX_ID} is missing"
            ))),
        }
    }

    /// Whether CRI says that this is the sandbox of a Pod.
    pub fn is_pod(&self) -> bool {
        self.annotation(CONTAINER_TYPE) == Some("sandbox")
    }

    /// The Pod's uid, where CRI names one.
    pub(crate) fn pod_uid(&self) -> Option<&str> {
        self.annotation(SANDBOX_UID)
    }

    /// The Pod's namespace in Kubernetes, where CRI names one.
    pub(crate) fn pod_namespace(&self) -> Option<&str> {
        self.annotation(SANDBOX_NAMESPACE)
    }

    /// The container's name in its Pod; none of the sandbox's own container.
    pub(crate) fn container_name(&self) -> Option<&str> {
        self.annotation(CONTAINER_NAME)
    }

    /// The PodSnapshot that the Pod is to be restored from.
    pub(crate) fn restore_snapshot(&self) -> Option<&str> {
        self.annotation(RESTORE_SNAPSHOT)
            .filter(|name| !name.is_empty())
    }

    /// Directory of the Pod's logs, where CRI names one.
    pub fn log_dir(&self) -> Option<PathBuf> {
        let dir = Path::new(self.annotation(SANDBOX_LOG_DIR)?);
        dir.is_absolute().then(|| dir.to_owned())
    }

    /// The checkpoint image that the Pod asks to start from.
    pub fn restore_image(&self) -> Option<&str> {
        self.annotation(RESTORE_IMAGE).filter(|p| !p.is_empty())
    }

    /// `linux.cgroupsPath`.
    pub fn cgroups_path(&self) -> Option<&str> {
        self.0
            .pointer("/linux/cgroupsPath")?
            .as_str()
            .filter(|p| !p.is_empty())
    }

    /// Whether the process gets a terminal.
    pub fn terminal(&self) -> bool {
        self.0
            .pointer("/process/terminal")
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }

    /// The limits of this container. A Pod's first has none: those of its pause program mean
    /// nothing for the sandbox around all others.
    pub fn limits(&self) -> Option<Limits> {
        if self.annotation(CONTAINER_TYPE) == Some("sandbox") {
            return None;
        }
        let resources = self.0.pointer("/linux/resources");
        Some(resources.map(Limits::of).unwrap_or_default())
    }

    /// The limits that CRI names for the whole Pod.
    pub fn pod_limits(&self) -> Limits {
        let number = |key| self.annotation(key).and_then(|n| n.parse::<i64>().ok());
        Limits::of(&json!({
            "memory": {"limit": number(SANDBOX_MEMORY)},
            "cpu": {
                "quota": number(SANDBOX_CPU_QUOTA),
                "period": number(SANDBOX_CPU_PERIOD),
                "shares": number(SANDBOX_CPU_SHARES),
            },
        }))
    }

    fn namespaces(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let list = self
            .0
            .pointer("/linux/namespaces")
            .and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|ns| {
            let path = ns
                .get("path")
                .and_then(Value::as_str)
                .filter(|p| !p.is_empty());
            Some((ns.get("type")?.as_str()?, path))
        })
    }

    /// The network that the spec asks for.
    pub fn network(&self) -> Network {
        match self.namespaces().find(|(kind, _)| *kind == "network") {
            None => Network::Host,
            Some((_, None)) => Network::New,
            Some((_, Some(path))) => Network::Netns(path.into()),
        }
    }

    /// Whether other containers' processes can outlive this one's first process in its pid
    /// namespace.
    pub fn shares_pids(&self) -> bool {
        self.namespaces()
            .find(|(kind, _)| *kind == "pid")
            .is_none_or(|(_, path)| path.is_some())
    }

    /// Refuses what no sandboxed container may ask for.
    ///
    /// `sandbox_pid` is the host process that stands for the sandbox, of which a member may name
    /// the namespaces.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for what is never allowed, [`Error::Denied`] for what this
    /// node's configuration could allow.
    pub fn check(&self, policy: &Policy, sandbox_pid: Option<u32>) -> Result<()> {
        let no = |what: String| Err(Error::InvalidArgument(format!("config.json: {what}")));
        let present = |path| self.0.pointer(path).is_some_and(|v| !is_empty(v));
        if present("/hooks") {
            return no("OCI hooks are refused: they would run on the host".into());
        }
        if present("/linux/seccomp/listenerPath") {
            return no(
                "a seccomp listener is refused: it would be told of a sandbox's calls".into(),
            );
        }
        if present("/linux/intelRdt") {
            return no("intelRdt is not available to sandboxes".into());
        }
        let mut kinds = Vec::new();
        for (kind, path) in self.namespaces() {
            if kinds.contains(&kind) {
                return no(format!("two namespaces of type {kind:?}"));
            }
            kinds.push(kind);
            if let Some(path) = path
                && !namespace_allowed(kind, path, sandbox_pid)
            {
                let advice = match kind {
                    "user" => {
                        ": hostUsers: false is refused in a sandbox, which has a user namespace \
                               anyway; remove it from the Pod"
                    }
                    _ => "",
                };
                return no(format!(
                    "namespace {kind:?} at {path:?} is not one of this Pod{advice}"
                ));
            }
        }
        if self.privileged() && !policy.allow_privileged {
            return Err(Error::Denied(
                "privileged containers are refused in a sandbox; remove securityContext.privileged, \
                 or set allow_privileged in the [kiln] table of the node's runtime configuration"
                    .into(),
            ));
        }
        if self.role()? == Role::Sandbox
            && self.network() == Network::Host
            && !policy.allow_host_network
        {
            return Err(Error::Denied(
                "hostNetwork is refused in a sandbox; set allow_host_network in the [kiln] table of \
                 the node's runtime configuration to allow it"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Whether it is what CRI makes of `privileged` (containerd
    /// `internal/cri/server/container_create.go`, `WithAllDevicesAllowed`, which
    /// `privileged_without_host_devices` leaves out, and `WithWriteableSysfs`). The sandbox of a
    /// Pod has a sysfs that can be written where any of its containers is privileged
    /// (`internal/cri/server/podsandbox/sandbox_run.go`), and runs nothing but a pause.
    fn privileged(&self) -> bool {
        self.has_all_devices() || (self.has_writable_sysfs() && !self.is_pod())
    }

    fn has_all_devices(&self) -> bool {
        let rules = self
            .0
            .pointer("/linux/resources/devices")
            .and_then(Value::as_array);
        rules.into_iter().flatten().any(|rule| {
            let unset = |key| rule.get(key).is_none_or(|v| is_empty(v) || v == "a");
            rule["allow"] == true
                && rule["access"] == "rwm"
                && unset("type")
                && unset("major")
                && unset("minor")
        })
    }

    fn has_writable_sysfs(&self) -> bool {
        let mounts = self.0.get("mounts").and_then(Value::as_array);
        mounts.into_iter().flatten().any(|mount| {
            let options = mount["options"].as_array();
            mount["type"] == "sysfs" && !options.into_iter().flatten().any(|option| option == "ro")
        })
    }

    /// The spec as JSON.
    pub fn value(&self) -> &Value {
        &self.0
    }

    /// The same, to be changed.
    pub(crate) fn value_mut(&mut self) -> &mut Value {
        &mut self.0
    }

    /// The host name of the sandbox, where the spec gives one.
    pub fn hostname(&self) -> Option<&str> {
        let name = self.0.get("hostname").and_then(Value::as_str);
        name.filter(|name| !name.is_empty())
    }

    /// Makes the container a member of the sandbox that the runtime knows as `id`.
    pub fn set_sandbox(&mut self, id: &ContainerId) {
        self.0["annotations"][SANDBOX_ID] = id.as_str().into();
    }

    /// Changes what the runtime must see differently.
    pub fn rewrite(&mut self, cgroup: &Cgroup, sandbox_limits: Option<&Limits>) {
        self.drop_runtime_annotations();
        paths::clean_spec(&mut self.0);
        self.0["linux"]["cgroupsPath"] = cgroup.spec_path().into();
        if let Some(limits) = sandbox_limits {
            self.set_limits(limits);
        }
        self.stop_propagation_to_the_host();
        self.keep_devices_of_the_host_out();
        if let Some(lowest) = oom::lowest_score_adj() {
            self.raise_oom_score_adj(lowest);
        }
    }

    /// `dev.gvisor.*` annotations switch flags, binaries and mounts of runsc: none is taken from
    /// a user.
    fn drop_runtime_annotations(&mut self) {
        if let Some(Value::Object(annotations)) = self.0.get_mut("annotations") {
            annotations.retain(|key, _| !key.starts_with("dev.gvisor."));
        }
    }

    /// Makes mounts of the paths that runsc would forget, in a container whose root file system
    /// is mounted at `rootfs`. Blocks.
    pub(crate) fn mount_masks(&mut self, rootfs: &Path) -> Result<()> {
        let list = |path| -> Vec<String> {
            let paths = self.0.pointer(path).and_then(Value::as_array);
            paths
                .into_iter()
                .flatten()
                .filter_map(|p| Some(p.as_str()?.to_owned()))
                .collect()
        };
        let (masked, readonly) = (list("/linux/maskedPaths"), list("/linux/readonlyPaths"));
        let more = masks::mounts(&masked, &readonly, rootfs)?;
        if let Some(mounts) = self.0.get_mut("mounts").and_then(Value::as_array_mut) {
            mounts.extend(more);
        } else if !more.is_empty() {
            self.0["mounts"] = more.into();
        }
        Ok(())
    }

    /// Makes the working directory that a read-only root file system lacks, where that is mounted
    /// at `rootfs`: a sentry makes it when nothing can be made there any more (gVisor
    /// `runsc/boot/vfs.go`, `setupContainerVFS`). In a mount it is the sentry's to make. Blocks.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn make_working_dir(&self, rootfs: &Path) -> Result<()> {
        let cwd = self.0.pointer("/process/cwd").and_then(Value::as_str);
        let Some(cwd) = cwd.map(Path::new).filter(|cwd| cwd.is_absolute()) else {
            return Ok(());
        };
        let mounts = self.0.get("mounts").and_then(Value::as_array);
        let mut targets = mounts
            .into_iter()
            .flatten()
            .filter_map(|m| m.get("destination")?.as_str());
        let is_mounted = targets.any(|target| cwd.starts_with(target));
        let is_readonly = self.0.pointer("/root/readonly") == Some(&Value::Bool(true));
        if is_mounted || !is_readonly {
            return Ok(());
        }
        paths::make_dir(rootfs, cwd)
    }

    fn set_limits(&mut self, limits: &Limits) {
        let resources = &mut self.0["linux"]["resources"];
        // To a runtime null is the same as a limit that is not there.
        resources["memory"]["limit"] = limits.memory.into();
        resources["cpu"]["quota"] = limits.cpu_quota_us.into();
        resources["cpu"]["period"] = limits.cpu_quota_us.map(|_| PERIOD_US).into();
        resources["cpu"]["shares"] = limits.cpu_shares.into();
    }

    /// runsc refuses shared propagation, since nothing mounted in a sandbox can reach the host.
    /// What the host mounts still arrives with `rslave`.
    fn stop_propagation_to_the_host(&mut self) {
        if let Some(root) = self.0.pointer_mut("/linux/rootfsPropagation") {
            slave(root);
        }
        let mounts = self.0.get_mut("mounts").and_then(Value::as_array_mut);
        for mount in mounts.into_iter().flatten() {
            let options = mount.get_mut("options").and_then(Value::as_array_mut);
            options.into_iter().flatten().for_each(slave);
        }
    }

    /// runsc opens a device node that it finds in a volume, and so hands out the host's device.
    /// Whatever is mounted from the host may hold such nodes; none is to be opened.
    fn keep_devices_of_the_host_out(&mut self) {
        let mounts = self.0.get_mut("mounts").and_then(Value::as_array_mut);
        for mount in mounts.into_iter().flatten() {
            // What hides a file is a node that there is in every sandbox anyway.
            if !is_bind(mount) || mount["source"] == "/dev/null" {
                continue;
            }
            match mount.get_mut("options").and_then(Value::as_array_mut) {
                Some(options) => {
                    options.retain(|option| option != "dev");
                    options.push("nodev".into());
                }
                None => mount["options"] = json!(["bind", "nodev"]),
            }
        }
    }

    /// A process without CAP_SYS_RESOURCE cannot go below its own value, and runtimes take the
    /// refusal for fatal.
    fn raise_oom_score_adj(&mut self, lowest: i64) {
        if let Some(adj) = self.0.pointer_mut("/process/oomScoreAdj")
            && adj.as_i64().is_some_and(|adj| adj < lowest)
        {
            log::warn!("oom_score_adj raised to {lowest}: CAP_SYS_RESOURCE is missing");
            *adj = lowest.into();
        }
    }
}

fn slave(option: &mut Value) {
    match option.as_str() {
        Some("shared") => *option = "slave".into(),
        Some("rshared") => *option = "rslave".into(),
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A network namespace is made by containerd and named by path; all others may only be those of
/// the Pod's own sandbox process.
fn namespace_allowed(kind: &str, path: &str, sandbox_pid: Option<u32>) -> bool {
    let file = match kind {
        "network" => "net",
        "mount" => return false,
        kind => kind,
    };
    let is_own = sandbox_pid.is_some_and(|pid| path == format!("/proc/{pid}/ns/{file}"));
    is_own || (kind == "network" && is_mounted_netns(Path::new(path)))
}

/// Whether `path` may be that of a network namespace which was mounted for a Pod, and not that of a
/// process. Paths are compared by their parts: a text may begin with `//`.
fn is_mounted_netns(path: &Path) -> bool {
    let climbs = path.components().any(|part| part == Component::ParentDir);
    path.is_absolute() && !climbs && !path.starts_with("/proc")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::needless_pass_by_value)] // callers write json!() in place
    fn spec(value: Value) -> Spec {
        Spec::parse(value.to_string().as_bytes()).unwrap()
    }

    #[track_caller]
    #[allow(clippy::needless_pass_by_value)]
    fn refused(value: Value, words: &str) {
        let e = spec(value).check(&Policy::default(), Some(7)).unwrap_err();
        assert!(e.to_string().contains(words), "{e}");
    }

    #[test]
    fn specs_that_reach_for_the_host_are_refused() {
        refused(
            json!({"hooks": {"prestart": [{"path": "/bin/sh"}]}}),
            "hooks",
        );
        refused(
            json!({"linux": {"seccomp": {"listenerPath": "/run/x"}}}),
            "listener",
        );
        refused(json!({"linux": {"intelRdt": {"closID": "x"}}}), "intelRdt");
        let ns = |kind, path| json!({"linux": {"namespaces": [{"type": kind, "path": path}]}});
        refused(ns("pid", "/proc/1/ns/pid"), "not one of this Pod");
        let pinned = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/a/pinned-namespaces/user";
        refused(ns("user", pinned), "hostUsers: false is refused");
        refused(ns("network", "/proc/1/ns/net"), "not one of this Pod");
        for path in [
            "//proc/1/ns/net",
            "/run/../proc/1/ns/net",
            "/./proc/1/ns/net",
            "proc/1/ns/net",
        ] {
            refused(ns("network", path), "not one of this Pod");
        }
        refused(ns("mount", "/proc/7/ns/mount"), "not one of this Pod");
        let twice = json!([{"type": "network"}, {"type": "network"}]);
        refused(json!({"linux": {"namespaces": twice}}), "two namespaces");
        let devices = json!([{"allow": true, "access": "rwm"}]);
        refused(
            json!({"linux": {"resources": {"devices": devices}}}),
            "privileged",
        );
        let sysfs = json!([{"type": "sysfs", "destination": "/sys", "options": ["nosuid", "rw"]}]);
        refused(json!({"mounts": sysfs}), "privileged");
        let network = json!([{"type": "network", "path": "/var/run/netns/cni-1"}]);
        let pause = json!({"annotations": {CONTAINER_TYPE: "sandbox"}, "mounts": sysfs, "linux": {"namespaces": network}});
        spec(pause).check(&Policy::default(), None).unwrap();
        refused(json!({"linux": {}}), "hostNetwork");
    }

    #[test]
    fn the_hosts_network_is_refused_by_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let [host, other] = ["host", "other"].map(|name| dir.path().join(name));
        std::os::unix::fs::symlink("/proc/self/ns/net", &host).unwrap();
        let e = Network::Netns(host).check().unwrap_err();
        assert!(e.to_string().contains("the host's"), "{e}");
        Network::Netns(other.clone()).check().unwrap();
        fs::write(&other, "").unwrap();
        Network::Netns(other).check().unwrap();
        Network::Host.check().unwrap();
    }

    #[test]
    fn specs_of_another_shape_are_refused() {
        for text in [
            "",
            "[]",
            "null",
            "{",
            r#"{"linux": []}"#,
            r#"{"linux": {"resources": {"cpu": "x"}}}"#,
        ] {
            assert!(Spec::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn specs_of_cri_are_accepted() {
        let policy = Policy::default();
        let pod = spec(json!({
            "annotations": {CONTAINER_TYPE: "sandbox"},
            "hooks": {},
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/var/run/netns/cni-1"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]},
            },
        }));
        pod.check(&policy, None).unwrap();
        assert_eq!(pod.network(), Network::Netns("/var/run/netns/cni-1".into()));
        assert!(!pod.shares_pids());
        let namespaces = json!([{"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "network", "path": "/proc/7/ns/net"}]);
        let member = spec(json!({
            "annotations": {CONTAINER_TYPE: "container", SANDBOX_ID: "pod1"},
            "linux": {"namespaces": namespaces},
        }));
        member.check(&policy, Some(7)).unwrap();
        assert_eq!(
            member.role().unwrap(),
            Role::Member("pod1".parse().unwrap())
        );
        assert!(member.shares_pids());
    }

    #[test]
    fn a_members_sandbox_id_must_be_an_id() {
        let member =
            |id: &str| spec(json!({"annotations": {CONTAINER_TYPE: "container", SANDBOX_ID: id}}));
        assert!(member("../../etc").role().is_err());
        assert!(
            spec(json!({"annotations": {CONTAINER_TYPE: "container"}}))
                .role()
                .is_err()
        );
    }

    #[test]
    fn rewriting_keeps_what_it_does_not_know() {
        let mut spec = spec(json!({
            "annotations": {"dev.gvisor.flag.network": "host", "mine": "kept"},
            "process": {"cwd": "/made/", "future": [1, 2]},
            "linux": {"rootfsPropagation": "rshared", "resources": {"cpu": {"shares": 2}, "unified": {"a": "b"}}},
            "mounts": [{"destination": "/m/.", "options": ["rbind", "rshared", "ro"]}],
        }));
        let cgroup = Cgroup::new(Path::new("/nowhere"), "/pods/p1").unwrap();
        let limits = Limits {
            memory: Some(1 << 20),
            ..Limits::default()
        };
        spec.rewrite(&cgroup, Some(&limits));
        assert_eq!(spec.0["annotations"], json!({"mine": "kept"}));
        let process = json!({"cwd": "/made", "future": [1, 2]});
        assert_eq!(spec.0["process"], process);
        assert_eq!(spec.0["mounts"][0]["destination"], "/m");
        assert_eq!(spec.0["linux"]["rootfsPropagation"], "rslave");
        assert_eq!(
            spec.0["mounts"][0]["options"],
            json!(["rbind", "rslave", "ro", "nodev"])
        );
        assert_eq!(spec.0["linux"]["cgroupsPath"], "/pods/p1");
        assert_eq!(spec.0["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(spec.0["linux"]["resources"]["unified"], json!({"a": "b"}));
    }

    #[test]
    fn a_working_directory_is_made_where_the_sentry_cannot() {
        for (cwd, readonly, made) in [
            ("/made/here", true, true),
            ("/made/here", false, false),
            ("/volume/here", true, false),
            ("made/here", true, false),
        ] {
            let rootfs = tempfile::tempdir().unwrap();
            let spec = spec(json!({
                "process": {"cwd": cwd},
                "root": {"readonly": readonly},
                "mounts": [{"type": "proc"}, {"destination": "/volume"}],
            }));
            spec.make_working_dir(rootfs.path()).unwrap();
            let entries = fs::read_dir(rootfs.path()).unwrap().count();
            assert_eq!(entries == 1, made, "{cwd} {readonly}");
            assert_eq!(rootfs.path().join("made/here").is_dir(), made);
        }
    }

    #[test]
    fn pod_limits_come_from_cri() {
        let pod = spec(json!({"annotations": {
            SANDBOX_MEMORY: "1048576", SANDBOX_CPU_QUOTA: "50000", SANDBOX_CPU_PERIOD: "100000", SANDBOX_CPU_SHARES: "512",
        }}));
        let expected = Limits {
            memory: Some(1 << 20),
            cpu_quota_us: Some(50_000),
            cpu_shares: Some(512),
        };
        assert_eq!(pod.pod_limits(), expected);
        assert_eq!(
            spec(json!({"annotations": {SANDBOX_MEMORY: "0"}})).pod_limits(),
            Limits::default()
        );
    }

    #[test]
    fn devices_in_volumes_are_not_opened() {
        let mut spec = spec(json!({"mounts": [
            {"destination": "/a", "type": "bind", "source": "/v", "options": ["rbind", "rw", "dev"]},
            {"destination": "/b", "source": "/v", "options": ["bind"]},
            {"destination": "/c", "type": "bind", "source": "/v"},
            {"destination": "/d", "type": "bind", "source": "/dev/null", "options": ["bind"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
        ]}));
        spec.keep_devices_of_the_host_out();
        let options: Vec<_> = (0..5)
            .map(|n| spec.0["mounts"][n]["options"].clone())
            .collect();
        assert_eq!(
            json!(options),
            json!([
                ["rbind", "rw", "nodev"],
                ["bind", "nodev"],
                ["bind", "nodev"],
                ["bind"],
                ["nosuid"]
            ])
        );
    }
}
