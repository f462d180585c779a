// SPDX-License-Identifier: Apache-2.0

//! What is baked into a sandbox when it boots, and so must be the same for a Pod that adopts it.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::shm;

/// Flags of runsc that make the boot depend on devices or files of the Pod. Sandboxes with
/// them are not made ahead.
const DEVICE_FLAGS: [&str; 3] = ["nvproxy", "tpuproxy", "rdma-expect-ipv6"];

/// The runtime's program, by what changes when it is replaced. Reading all of it for a digest
/// would cost more than the boot that it saves.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl RuntimeFile {
    /// Looks at the program at `path`, following symbolic links.
    ///
    /// # Errors
    /// When it is not there.
    pub fn of(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let meta = fs::metadata(&path)?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.size(),
            changed_s: meta.ctime(),
            changed_ns: meta.ctime_nsec(),
            path,
        })
    }
}

/// How a node drives its runtime, as far as a sandbox is made by it.
#[derive(Debug, Clone)]
pub struct Setup<'a> {
    /// The runtime's program.
    pub runtime: RuntimeFile,
    /// Where it keeps its state, with the containerd namespace.
    pub root: &'a Path,
    /// Its global flags.
    pub flags: &'a BTreeMap<String, String>,
}

/// Why a Pod cannot have a sandbox that was made ahead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ineligible {
    /// Its user namespace would have to be known at boot.
    #[error("it has a user namespace")]
    UserNamespace,
    /// Its network is not one that the sentry serves itself.
    #[error("its network is {0}")]
    Network(String),
    /// The runtime's flag ties a sandbox to devices at boot.
    #[error("the runtime's flag {0} is on")]
    Flag(String),
    /// They would have to be known at boot.
    #[error("its containers share volumes within the sandbox")]
    SharedVolumes,
}

/// The shape of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    runtime: RuntimeFile,
    root: PathBuf,
    flags: BTreeMap<String, String>,
    /// Bytes of memory that it says it has; `None` for all of the host's.
    pub memory: Option<u64>,
    /// Quota and period of its CPU time in microseconds, where the runtime derives the number
    /// of CPUs from them.
    pub cpu: Option<(u64, u64)>,
    sysctl: BTreeMap<String, String>,
    /// Whether its containers have one `/dev/shm`, as [`shm`] says. Shapes that were written
    /// before there was that have it not.
    #[serde(default)]
    shm: bool,
}

impl Shape {
    /// The shape of the sandbox that `setup` makes of `spec`, the OCI spec of a root container as
    /// the runtime gets it.
    ///
    /// # Errors
    /// [`Ineligible`] when such a sandbox cannot be made ahead.
    pub fn of(spec: &Value, setup: Setup<'_>) -> Result<Self, Ineligible> {
        let on = |flag: &str| setup.flags.get(flag).is_some_and(|v| v != "false");
        if let Some(flag) = DEVICE_FLAGS.into_iter().find(|flag| on(flag)) {
            return Err(Ineligible::Flag(flag.to_owned()));
        }
        match setup.flags.get("network").map(String::as_str) {
            None | Some("sandbox") => {}
            Some(other) => return Err(Ineligible::Network(other.to_owned())),
        }
        let namespaces = spec.pointer("/linux/namespaces").and_then(Value::as_array);
        let has = |kind: &str| namespaces.into_iter().flatten().any(|n| n["type"] == kind);
        if has("user") || spec.pointer("/linux/uidMappings/0").is_some() {
            return Err(Ineligible::UserNamespace);
        }
        if !has("network") {
            return Err(Ineligible::Network("the host's".to_owned()));
        }
        let annotations = spec["annotations"].as_object();
        let keys = annotations.into_iter().flatten().map(|(key, _)| key);
        let hints: Vec<_> = keys.filter(|key| key.starts_with(shm::HINTS)).collect();
        if hints.iter().any(|key| !shm::is_hint(key)) {
            return Err(Ineligible::SharedVolumes);
        }
        let number = |path| {
            spec.pointer(path)
                .and_then(Value::as_u64)
                .filter(|n| *n > 0)
        };
        let quota = number("/linux/resources/cpu/quota").filter(|_| on("cpu-num-from-quota"));
        let period = number("/linux/resources/cpu/period");
        let sysctl = spec.pointer("/linux/sysctl").and_then(Value::as_object);
        let text =
            |(k, v): (&String, &Value)| (k.clone(), v.as_str().unwrap_or_default().to_owned());
        Ok(Self {
            runtime: setup.runtime,
            root: setup.root.to_owned(),
            flags: setup.flags.clone(),
            memory: number("/linux/resources/memory/limit"),
            cpu: quota.zip(period),
            sysctl: sysctl.into_iter().flatten().map(text).collect(),
            shm: !hints.is_empty(),
        })
    }

    /// Writes into `spec` what makes a sandbox of this shape of it.
    pub fn apply(&self, spec: &mut Value) {
        let resources = &mut spec["linux"]["resources"];
        if let Some(memory) = self.memory {
            resources["memory"]["limit"] = memory.into();
        }
        if let Some((quota, period)) = self.cpu {
            resources["cpu"]["quota"] = quota.into();
            resources["cpu"]["period"] = period.into();
        }
        spec["linux"]["sysctl"] = serde_json::json!(self.sysctl);
        if self.shm {
            shm::hint(spec);
        }
    }

    /// The same shape with another amount of memory, in bytes.
    #[must_use]
    pub fn with_memory(self, memory: Option<u64>) -> Self {
        Self { memory, ..self }
    }

    /// Whether `setup` still makes sandboxes of this shape.
    pub fn is_made_by(&self, setup: &Setup<'_>) -> bool {
        self.runtime == setup.runtime && self.root == setup.root && self.flags == *setup.flags
    }

    /// The class key: a digest of the whole shape, in hexadecimal digits.
    pub fn key(&self) -> String {
        let digest = Sha256::digest(self.to_json().as_bytes());
        digest.iter().take(16).map(|b| format!("{b:02x}")).collect()
    }

    /// The shape as JSON with its keys in a fixed order.
    pub fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Reads what [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    /// When the text is larger than [`MAX_SHAPE`](crate::MAX_SHAPE) or is no shape.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        if text.len() > crate::MAX_SHAPE {
            return Err(serde::de::Error::custom("a shape of that size"));
        }
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file() -> RuntimeFile {
        RuntimeFile::of(Path::new("/proc/self/exe")).unwrap()
    }

    fn flags(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        pairs.iter().map(owned).collect()
    }

    fn shape(spec: &Value, flags: &BTreeMap<String, String>) -> Result<Shape, Ineligible> {
        let (runtime, root) = (file(), Path::new("/run/r"));
        Shape::of(
            spec,
            Setup {
                runtime,
                root,
                flags,
            },
        )
    }

    fn pod() -> Value {
        json!({"linux": {
            "namespaces": [{"type": "network", "path": "/run/netns/a"}, {"type": "pid"}],
            "resources": {"memory": {"limit": 1 << 28}, "cpu": {"quota": 50_000, "period": 100_000, "shares": 2}},
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
            "cgroupsPath": "/kubepods/pod1/a",
        }, "hostname": "a"})
    }

    #[test]
    fn what_can_be_changed_later_is_not_in_the_key() {
        let one = shape(&pod(), &flags(&[])).unwrap();
        let mut other = pod();
        other["hostname"] = "b".into();
        other["linux"]["cgroupsPath"] = "/kubepods/pod2/b".into();
        other["linux"]["namespaces"][0]["path"] = "/run/netns/b".into();
        other["linux"]["resources"]["cpu"] = json!({"quota": 10_000, "period": 100_000});
        assert_eq!(one.key(), shape(&other, &flags(&[])).unwrap().key());
    }

    #[test]
    fn what_is_baked_in_is_in_the_key() {
        let one = shape(&pod(), &flags(&[])).unwrap().key();
        let mut more = pod();
        more["linux"]["resources"]["memory"]["limit"] = (1u64 << 29).into();
        assert_ne!(one, shape(&more, &flags(&[])).unwrap().key());
        let mut more = pod();
        more["linux"]["sysctl"]["net.ipv6.conf.all.disable_ipv6"] = "1".into();
        assert_ne!(one, shape(&more, &flags(&[])).unwrap().key());
        let quota = flags(&[("cpu-num-from-quota", "true")]);
        let counted = shape(&pod(), &quota).unwrap();
        assert_eq!(counted.cpu, Some((50_000, 100_000)));
        assert_ne!(one, counted.key());
        assert_ne!(
            one,
            shape(&pod(), &flags(&[("debug", "true")])).unwrap().key()
        );
        let mut hinted = pod();
        shm::hint(&mut hinted);
        assert_ne!(one, shape(&hinted, &flags(&[])).unwrap().key());
    }

    #[test]
    fn what_cannot_be_made_ahead_is_told_apart() {
        let plain = flags(&[]);
        let mut user = pod();
        user["linux"]["namespaces"][1] = json!({"type": "user"});
        assert_eq!(shape(&user, &plain), Err(Ineligible::UserNamespace));
        let mut host = pod();
        host["linux"]["namespaces"] = json!([]);
        assert!(matches!(shape(&host, &plain), Err(Ineligible::Network(_))));
        let gpu = flags(&[("nvproxy", "true")]);
        assert_eq!(shape(&pod(), &gpu), Err(Ineligible::Flag("nvproxy".into())));
        let none = flags(&[("network", "none")]);
        assert!(matches!(shape(&pod(), &none), Err(Ineligible::Network(_))));
        let mut volume = pod();
        shm::hint(&mut volume);
        assert!(shape(&volume, &plain).is_ok());
        volume["annotations"]["dev.gvisor.spec.mount.cache.share"] = "pod".into();
        assert_eq!(shape(&volume, &plain), Err(Ineligible::SharedVolumes));
    }

    #[test]
    fn a_shape_is_what_makes_it() {
        let quota = flags(&[("cpu-num-from-quota", "true")]);
        let mut hinted = pod();
        shm::hint(&mut hinted);
        for pod in [pod(), hinted] {
            let one = shape(&pod, &quota).unwrap();
            let mut made = json!({"linux": {"namespaces": [{"type": "network"}]}});
            one.apply(&mut made);
            assert_eq!(shape(&made, &quota).unwrap(), one);
            assert_eq!(Shape::from_json(&one.to_json()).unwrap(), one);
        }
    }

    #[test]
    fn shapes_of_older_programs_are_read() {
        let one = shape(&pod(), &flags(&[])).unwrap();
        let mut old: Value = serde_json::from_str(&one.to_json()).unwrap();
        old.as_object_mut().unwrap().remove("shm");
        assert_eq!(Shape::from_json(&old.to_string()).unwrap(), one);
    }

    #[test]
    fn any_text_is_a_shape_or_refused() {
        bolero::check!().for_each(|text: &[u8]| {
            if let Ok(shape) = Shape::from_json(&String::from_utf8_lossy(text)) {
                assert_eq!(
                    Shape::from_json(&shape.to_json()).unwrap().key(),
                    shape.key()
                );
            }
        });
    }

    #[test]
    fn a_shape_that_is_too_large_is_none() {
        let text = shape(&pod(), &flags(&[])).unwrap().to_json();
        let of_size = |bytes: usize| text.clone() + &" ".repeat(bytes - text.len());
        assert!(Shape::from_json(&of_size(crate::MAX_SHAPE)).is_ok());
        assert!(Shape::from_json(&of_size(crate::MAX_SHAPE + 1)).is_err());
    }
}
