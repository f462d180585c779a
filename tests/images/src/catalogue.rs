// SPDX-License-Identifier: Apache-2.0
//! Which images there are, what they hold and what they are called.
//!
//! Those of critest are stand-ins for the images that cri-tools v1.36.0 pulls
//! (pkg/framework/util.go, pkg/validate/consts.go, images/); what its specs look for in them is
//! here, and in the guest program. One it asks for cannot be made: test-image-digest under a
//! fixed digest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::cache::Cache;
use crate::image::{Config, Empty, Image, architecture};
use crate::layer::{Attributes, Layer, LayerBuilder, LayerError};
use crate::program::Program;
use crate::reference::{NotAReference, Reference};

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// A layer of it.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A name of it.
    #[error(transparent)]
    Name(#[from] NotAReference),
    /// Its documents.
    #[error("cannot write the documents of an image")]
    Document(#[from] serde_json::Error),
}

const DOCKER: &str = "docker.io/library";
const KUBERNETES: &str = "registry.k8s.io";
const E2E: &str = "registry.k8s.io/e2e-test-images";
const AGENT_SANDBOX: &str = "registry.k8s.io/agent-sandbox";
const CRI_TOOLS: &str = "gcr.io/k8s-staging-cri-tools";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Directory of the host that image `kiln-hostile` reaches for.
pub const OUTSIDE: &str = "/tmp/kiln-outside";

/// The program of the image `python-runtime-sandbox`.
const PYTHON_RUNTIME: &[u8] = include_bytes!("python_runtime.py");

/// Directories of the busybox layer besides /tmp.
const DIRECTORIES: [&str; 21] = [
    "bin",
    "dev",
    "etc",
    "home",
    "mnt",
    "opt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "usr",
    "usr/bin",
    "usr/local",
    "usr/local/bin",
    "usr/sbin",
    "var",
    "var/log",
    "var/run",
    "var/spool",
    "var/www",
];

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";

const GROUP: &str = "\
root:x:0:
daemon:x:1:
www-data:x:33:
nogroup:x:65534:
";

/// What images are made from.
pub(crate) struct Parts<'a> {
    pub(crate) busybox: &'a Program,
    pub(crate) guest: &'a Program,
    /// The root of a tree with Python in usr/bin.
    pub(crate) python: Option<&'a Path>,
    pub(crate) cache: Option<&'a Cache>,
}

/// Makes every image that `parts` is enough for.
pub(crate) fn images(parts: &Parts<'_>) -> Result<Vec<Image>, CatalogueError> {
    let mut images = Shelf {
        base: base(parts)?,
        images: Vec::new(),
    };
    images.plain(parts)?;
    images.pauses(parts)?;
    images.critest(parts)?;
    Ok(images.images)
}

struct Shelf {
    /// The busybox layer.
    base: Layer,
    images: Vec<Image>,
}

impl Shelf {
    fn add(
        &mut self,
        name: &'static str,
        references: Vec<Reference>,
        layers: Vec<Layer>,
        config: Config,
    ) -> Result<(), CatalogueError> {
        self.images
            .push(Image::new(name, references, layers, config)?);
        Ok(())
    }

    /// Images for our own tests and for users' manifests.
    fn plain(&mut self, parts: &Parts<'_>) -> Result<(), CatalogueError> {
        let base = self.base.clone();
        let tags = ["latest", "stable", "1", "1.28", "1.36", "1.37"];
        self.add(
            "busybox",
            named(DOCKER, "busybox", &tags)?,
            vec![base.clone()],
            running(["sh"]),
        )?;

        let mut layer = LayerBuilder::new();
        layer.file("bin/kiln-guest", 0o755, &parts.guest.bytes)?;
        for applet in &parts.guest.applets {
            layer.hard_link(&format!("bin/{applet}"), "bin/kiln-guest")?;
        }
        let layers = vec![base.clone(), layer.finish(parts.cache)?];
        self.add(
            "kiln-guest",
            named(DOCKER, "kiln-guest", &["latest"])?,
            layers,
            running(["sh"]),
        )?;

        self.hostile(parts)?;

        let volumes = Config {
            volumes: BTreeMap::from([("/volume/of/image/".to_owned(), Empty {})]),
            ..running(["sh"])
        };
        self.add(
            "kiln-volume",
            named(DOCKER, "kiln-volume", &["latest"])?,
            vec![base.clone()],
            volumes,
        )?;

        let layers = vec![base.clone(), guest_as("usr/sbin/nginx", parts)?];
        self.add(
            "nginx",
            named(DOCKER, "nginx", &["latest", "1"])?,
            layers,
            nginx(),
        )?;

        if let Some(tree) = parts.python {
            let mut layer = LayerBuilder::new();
            let lower: BTreeSet<&Path> =
                DIRECTORIES.iter().chain(&["tmp"]).map(Path::new).collect();
            layer.tree(tree, &lower)?;
            if !layer.contains("usr/bin/python") {
                layer.symlink("usr/bin/python", "python3")?;
            }
            let mut config = running(["python3"]);
            config.env.push("LANG=C.UTF-8".to_owned());
            let layers = vec![base, layer.finish(parts.cache)?];
            self.add(
                "python",
                named(DOCKER, "python", &["latest", "3", "3.11", "3-slim"])?,
                layers.clone(),
                config.clone(),
            )?;
            self.python_runtime(parts, layers, config)?;
        }
        Ok(())
    }

    /// An image that wants what is mounted into it to land on the host, in `OUTSIDE`.
    fn hostile(&mut self, parts: &Parts<'_>) -> Result<(), CatalogueError> {
        let up = "../".repeat(16) + OUTSIDE.trim_start_matches('/');
        let mut layer = LayerBuilder::new();
        // What every container gets mounted.
        layer.symlink("etc/resolv.conf", &format!("{up}/resolv.conf"))?;
        layer.symlink("etc/hosts", &format!("{OUTSIDE}/hosts"))?;
        layer.symlink("etc/hostname", &format!("{up}/hostname"))?;
        // What a Pod asks to be mounted over.
        layer.symlink("mnt/up", &up)?;
        layer.symlink("mnt/absolute", OUTSIDE)?;
        layer.symlink("mnt/proc", &format!("/proc/1/root{OUTSIDE}"))?;
        layer.file("bin/suid", 0o4755, &parts.guest.bytes)?;
        let layers = vec![self.base.clone(), layer.finish(parts.cache)?];
        self.add(
            "kiln-hostile",
            named(DOCKER, "kiln-hostile", &["latest"])?,
            layers,
            running(["sh"]),
        )
    }

    /// What answers over HTTP in the sandboxes of agent-sandbox's examples.
    fn python_runtime(
        &mut self,
        parts: &Parts<'_>,
        mut layers: Vec<Layer>,
        python: Config,
    ) -> Result<(), CatalogueError> {
        let mut layer = LayerBuilder::new();
        let users = Attributes {
            mode: 0o755,
            owner: (1000, 1000),
        };
        layer.directory("app", users)?;
        layer.file("opt/runtime.py", 0o644, PYTHON_RUNTIME)?;
        layers.push(layer.finish(parts.cache)?);
        let config = Config {
            user: Some("1000:1000".to_owned()),
            exposed_ports: BTreeMap::from([("8888/tcp".to_owned(), Empty {})]),
            entrypoint: ["python3", "/opt/runtime.py"].map(str::to_owned).into(),
            cmd: Vec::new(),
            ..python
        };
        let names = named(
            AGENT_SANDBOX,
            "python-runtime-sandbox",
            &["v0.1.0", "latest"],
        )?;
        self.add("python-runtime", names, layers, config)
    }

    /// The image of Pod sandboxes, and the one that critest pulls and removes from two hosts.
    /// Removing that one removes all names of its id: the sandbox image must have another.
    fn pauses(&mut self, parts: &Parts<'_>) -> Result<(), CatalogueError> {
        let layers = vec![guest_as("pause", parts)?];
        let config = Config {
            entrypoint: vec!["/pause".to_owned()],
            user: Some("65535:65535".to_owned()),
            ..running([])
        };
        // 3.10.2 is what containerd 2.4 uses when it is not told (internal/cri/config/config.go).
        let sandbox = named(KUBERNETES, "pause", &["3.10", "3.10.1", "3.10.2"])?;
        self.add("pause", sandbox, layers.clone(), config.clone())?;
        let mut two_hosts = named(KUBERNETES, "pause", &["3.9"])?;
        two_hosts.extend(named("k8s.gcr.io", "pause", &["3.9"])?);
        self.add("critest-pause", two_hosts, layers, config)
    }

    fn critest(&mut self, parts: &Parts<'_>) -> Result<(), CatalogueError> {
        let base = self.base.clone();
        self.add(
            "critest-busybox",
            named(E2E, "busybox", &["1.29-2"])?,
            vec![base.clone()],
            running(["sh"]),
        )?;
        // Its benchmarks remove these, so they are no tags of our own busybox.
        let tags = ["1", "1-glibc", "1-musl", "1-uclibc", "1.35.0-glibc"];
        let benchmarks = named("public.ecr.aws/docker/library", "busybox", &tags)?;
        self.add(
            "critest-benchmark",
            benchmarks,
            vec![base.clone()],
            running(["sh"]),
        )?;

        let web = vec![base.clone(), guest_as("usr/sbin/nginx", parts)?];
        self.add(
            "critest-nginx",
            named(E2E, "nginx", &["1.14-2"])?,
            web.clone(),
            nginx(),
        )?;
        let host_network = format!("hostnet-nginx-{}", architecture());
        self.add(
            "critest-hostnet",
            named(CRI_TOOLS, &host_network, &["latest"])?,
            web,
            running(["nginx", "12003"]),
        )?;
        let web = vec![base.clone(), guest_as("usr/sbin/httpd", parts)?];
        let config = Config {
            exposed_ports: port("80/tcp"),
            ..running(["httpd"])
        };
        self.add(
            "critest-httpd",
            named(E2E, "httpd", &["2.4.39-4"])?,
            web,
            config,
        )?;

        let mut layer = LayerBuilder::new();
        layer.directory("etc", Attributes::mode(0o755))?;
        layer.directory("tmp", Attributes::mode(0o1777))?;
        layer.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
        layer.file("etc/group", 0o644, GROUP.as_bytes())?;
        layer.file("nnp", 0o4755, &parts.guest.bytes)?;
        let config = Config {
            entrypoint: vec!["/nnp".to_owned()],
            ..running([])
        };
        self.add(
            "critest-nonewprivs",
            named(E2E, "nonewprivs", &["1.3"])?,
            vec![layer.finish(parts.cache)?],
            config,
        )?;

        for (name, repository, user) in [
            ("critest-user-uid", "test-image-user-uid", "1002"),
            (
                "critest-user-username",
                "test-image-user-username",
                "www-data",
            ),
            (
                "critest-user-uid-group",
                "test-image-user-uid-group",
                "1003:1004",
            ),
            (
                "critest-user-username-group",
                "test-image-user-username-group",
                "www-data:1004",
            ),
        ] {
            let config = Config {
                user: Some(user.to_owned()),
                ..running(["sh"])
            };
            self.add(
                name,
                named(CRI_TOOLS, repository, &["latest"])?,
                vec![base.clone()],
                config,
            )?;
        }

        let mut layer = LayerBuilder::new();
        let passwd = format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n");
        let group =
            format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n");
        layer.file("etc/passwd", 0o644, passwd.as_bytes())?;
        layer.file("etc/group", 0o644, group.as_bytes())?;
        layer.directory(
            "home/default-user",
            Attributes {
                mode: 0o755,
                owner: (1000, 1000),
            },
        )?;
        let layers = vec![base.clone(), layer.finish(parts.cache)?];
        let config = Config {
            user: Some("1000".to_owned()),
            ..running(["sh"])
        };
        self.add(
            "critest-predefined-group",
            named(CRI_TOOLS, "test-image-predefined-group", &["latest"])?,
            layers,
            config,
        )?;

        // Images that are only pulled, listed and removed. Each adds one empty file, as there.
        for (name, repository, file, tags) in [
            ("critest-1", "test-image-1", "test-image-1", &["latest"][..]),
            ("critest-2", "test-image-2", "test-image-2", &["latest"]),
            ("critest-3", "test-image-3", "test-image-3", &["latest"]),
            (
                "critest-latest",
                "test-image-latest",
                "test-image-latest",
                &["latest"],
            ),
            (
                "critest-digest",
                "test-image-digest",
                "test-image-digest",
                &["latest"],
            ),
            (
                "critest-tags",
                "test-image-tags",
                "same-image",
                &["1", "2", "3"],
            ),
            ("critest-tag-test", "test-image-tag", "test", &["test"]),
            ("critest-tag-all", "test-image-tag", "all", &["all"]),
        ] {
            let mut layer = LayerBuilder::new();
            layer.file(file, 0o644, b"")?;
            let layers = vec![base.clone(), layer.finish(parts.cache)?];
            self.add(
                name,
                named(CRI_TOOLS, repository, tags)?,
                layers,
                running(["sh"]),
            )?;
        }
        Ok(())
    }
}

/// The layer below most images: busybox, users, and the directories that programs expect.
fn base(parts: &Parts<'_>) -> Result<Layer, CatalogueError> {
    let mut layer = LayerBuilder::new();
    for directory in DIRECTORIES {
        layer.directory(directory, Attributes::mode(0o755))?;
    }
    layer.directory("tmp", Attributes::mode(0o1777))?;
    layer.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    layer.file("etc/group", 0o644, GROUP.as_bytes())?;
    layer.file("etc/shadow", 0o640, b"root:*:1::::::\n")?;

    layer.file("bin/busybox", 0o755, &parts.busybox.bytes)?;
    if let Some(shell) = parts.busybox.without("ls") {
        layer.file("bin/sh", 0o755, &shell)?;
        layer.hard_link("bin/ash", "bin/sh")?;
    }
    // Hard links: a path that a test masks or replaces must not take the other names with it.
    for applet in &parts.busybox.applets {
        let path = format!("bin/{applet}");
        if !layer.contains(&path) {
            layer.hard_link(&path, "bin/busybox")?;
        }
    }
    layer.hard_link("usr/bin/env", "bin/busybox")?;
    // Tests call them, and Debian's busybox lacks them.
    let missing: Vec<_> = ["pgrep", "ipcs"]
        .into_iter()
        .map(|a| format!("bin/{a}"))
        .filter(|p| !layer.contains(p))
        .collect();
    if let [first, others @ ..] = missing.as_slice() {
        layer.file(first, 0o755, &parts.guest.bytes)?;
        for other in others {
            layer.hard_link(other, first)?;
        }
    }
    Ok(layer.finish(parts.cache)?)
}

/// A layer with the guest program at `path`, whose last part says what it is.
fn guest_as(path: &str, parts: &Parts<'_>) -> Result<Layer, CatalogueError> {
    let mut layer = LayerBuilder::new();
    layer.file(path, 0o755, &parts.guest.bytes)?;
    Ok(layer.finish(parts.cache)?)
}

fn named(prefix: &str, repository: &str, tags: &[&str]) -> Result<Vec<Reference>, NotAReference> {
    tags.iter()
        .map(|tag| format!("{prefix}/{repository}:{tag}").parse())
        .collect()
}

fn running<const N: usize>(command: [&str; N]) -> Config {
    let cmd = command.map(str::to_owned).into();
    Config {
        env: vec![PATH.to_owned()],
        cmd,
        ..Config::default()
    }
}

fn nginx() -> Config {
    Config {
        exposed_ports: port("80/tcp"),
        ..running(["nginx", "-g", "daemon off;"])
    }
}

fn port(port: &str) -> BTreeMap<String, Empty> {
    BTreeMap::from([(port.to_owned(), Empty {})])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(applets: &[&str]) -> Program {
        Program {
            bytes: b"program".to_vec(),
            applets: applets.iter().map(|a| (*a).to_owned()).collect(),
        }
    }

    fn all(python: Option<&Path>) -> Vec<Image> {
        let (busybox, guest) = (program(&["[", "ls", "sh"]), program(&["pause", "nginx"]));
        images(&Parts {
            busybox: &busybox,
            guest: &guest,
            python,
            cache: None,
        })
        .unwrap()
    }

    #[test]
    fn every_image_has_a_name_and_an_id_of_its_own() {
        let images = all(None);
        let count = images.len();
        let unique = |field: &dyn Fn(&Image) -> String| {
            images.iter().map(field).collect::<BTreeSet<_>>().len()
        };
        assert_eq!(unique(&|i| i.name.to_owned()), count);
        assert_eq!(unique(&|i| i.config.digest.to_string()), count);
        let references: Vec<_> = images.iter().flat_map(|i| &i.references).collect();
        assert_eq!(
            references.iter().collect::<BTreeSet<_>>().len(),
            references.len()
        );
    }

    #[test]
    fn images_are_the_same_on_every_run() {
        let digests = || {
            all(None)
                .iter()
                .map(|i| i.manifest.digest)
                .collect::<Vec<_>>()
        };
        assert_eq!(digests(), digests());
    }

    #[test]
    fn python_lies_on_busybox_and_leaves_its_directories_alone() {
        let tree = tempfile::tempdir().unwrap();
        for directory in ["usr/bin", "usr/lib", "tmp"] {
            std::fs::create_dir_all(tree.path().join(directory)).unwrap();
        }
        std::fs::write(tree.path().join("usr/bin/python3"), "x").unwrap();
        let images = all(Some(tree.path()));
        let python = images.iter().find(|i| i.name == "python").unwrap();
        assert_eq!(python.layers.len(), 2);
        let mut archive =
            tar::Archive::new(flate2::read::GzDecoder::new(&python.layers[1].bytes[..]));
        let paths: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(paths, ["usr/bin/python3", "usr/lib", "usr/bin/python"]);
    }
}
