// SPDX-License-Identifier: Apache-2.0

//! The machine as a node: its containerd, what an operator installs by README, and Pods as a kubelet
//! with systemd's cgroup driver makes them.

use std::{env, fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result, ensure};
use kiln_tests::{images, place::Place, process::Cmd, suite::Fixture, tools};
use serde_json::json;
use tokio::sync::OnceCell;

use crate::machine::Machine;

const BUSYBOX: &str = "docker.io/library/busybox:latest";
const PAUSE: &str = "registry.k8s.io/pause:3.10";

/// Bytes of memory of a Pod, of which a kubelet tells its slice, and of the warm sandboxes.
pub(crate) const MEMORY: u64 = 300 << 20;

/// Where the cgroups of burstable Pods are.
const BURSTABLE: &str = "/kubepods.slice/kubepods-burstable.slice";

/// What a container does: it serves a directory, until it is told to use up its memory.
const IDLE: &str = r#"echo hello; httpd -p 8080 -h /bin; while [ ! -e /tmp/exhaust ]; do sleep 1; done
exec dd if=/dev/zero of=/dev/null bs=1G count=1"#;

/// Which containerd the node has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Containerd {
    /// That of the distribution, 1.7.
    Packaged,
    /// That of `tests/deps`, 2.x.
    Ours,
}

/// A node.
pub(crate) struct Node {
    machine: Machine,
    containerd: Containerd,
    enabled: OnceCell<()>,
    agent: OnceCell<()>,
}

impl Node {
    /// Boots one. `$KILN_VM_CONTAINERD` is 1 (the default) or 2.
    pub(crate) async fn start() -> Result<Self> {
        let containerd = match env::var("KILN_VM_CONTAINERD").as_deref() {
            Ok("2") => Containerd::Ours,
            _ => Containerd::Packaged,
        };
        let place = Place::new()?;
        let brought = place.dir().join("brought");
        bring(&brought).await?;
        let machine = Machine::boot(place, &brought).await?;
        let this = Self {
            machine,
            containerd,
            enabled: OnceCell::new(),
            agent: OnceCell::new(),
        };
        this.set_up().await?;
        Ok(this)
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(crate) async fn sh(&self, script: &str) -> Result<String> {
        self.machine.sh(script).await
    }

    /// What a node has before Kiln comes to it.
    async fn set_up(&self) -> Result<()> {
        let (section, pause) = match self.containerd {
            Containerd::Packaged => (
                "io.containerd.grpc.v1.cri",
                format!("sandbox_image = '{PAUSE}'"),
            ),
            Containerd::Ours => ("io.containerd.cri.v1.runtime", String::new()),
        };
        let runc = format!(
            "[plugins.'{section}'.containerd.runtimes.runc]\n\
             runtime_type = 'io.containerd.runc.v2'\n\
             [plugins.'{section}'.containerd.runtimes.runc.options]\nSystemdCgroup = true\n"
        );
        let config = match self.containerd {
            Containerd::Packaged => format!(
                "version = 2\n[plugins.'{section}']\n{pause}\n\
                 [plugins.'{section}'.cni]\nbin_dir = '/usr/lib/cni'\nconf_dir = '/etc/cni/net.d'\n{runc}"
            ),
            Containerd::Ours => format!(
                "version = 3\n\
                 [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{PAUSE}'\n\
                 [plugins.'{section}'.cni]\nbin_dirs = ['/usr/lib/cni']\nconf_dir = '/etc/cni/net.d'\n{runc}"
            ),
        };
        let unit = match self.containerd {
            Containerd::Packaged => "",
            Containerd::Ours => {
                "[Service]\nEnvironment=PATH=/mnt/containerd:/usr/sbin:/usr/bin:/sbin:/bin\nExecStart=\nExecStart=/mnt/containerd/containerd\n"
            }
        };
        let network = json!({"cniVersion": "1.0.0", "name": "vm", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "ipam": {
                "type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ]});
        self.sh(&format!(
            "set -e; mkdir -p /etc/cni/net.d /etc/systemd/system/containerd.service.d\n\
             cat >/etc/cni/net.d/10-vm.conflist <<'END'\n{network}\nEND\n\
             cat >/etc/containerd/config.toml <<'END'\n{config}\nEND\n\
             cat >/etc/systemd/system/containerd.service.d/vm.conf <<'END'\n{unit}\nEND\n\
             printf 'runtime-endpoint: unix:///run/containerd/containerd.sock\\ntimeout: 300\\n' >/etc/crictl.yaml\n\
             systemctl daemon-reload; systemctl restart containerd\n\
             for image in /mnt/images/*; do ctr -n k8s.io images import $image; done\n\
             install -m 0755 /mnt/bin/runsc /usr/local/bin/"
        ))
        .await
        .map(drop)
    }

    /// Has Kiln on the node, by `kilnctl node enable`.
    pub(crate) async fn enabled(&self) -> Result<()> {
        let enable = async || {
            let said = self.enable("/mnt/kiln").await?;
            ensure!(said.contains("sandboxes run"), "{said}");
            Ok(())
        };
        self.enabled.get_or_try_init(enable).await.map(drop)
    }

    /// Runs `kilnctl node enable`, and returns what it says.
    pub(crate) async fn enable(&self, from: &str) -> Result<String> {
        self.sh(&format!(
            "kilnctl node enable --from {from} --runsc /usr/local/bin/runsc 2>&1"
        ))
        .await
    }

    /// Has the agent on the node, by README, and waits until it listens. It learns from Pods what to
    /// hold: their shapes have sysctls that depend on containerd.
    pub(crate) async fn agent(&self) -> Result<()> {
        self.enabled().await?;
        let install = async || {
            self.sh(
                "set -e; install -D -m 0755 -t /opt/kiln/bin /mnt/kiln/kiln-node-agent /mnt/kiln/kiln-pause
                 printf 'pause = \"/opt/kiln/bin/kiln-pause\"\n[limits]\ntotal = 2\nlearned = 1\n' >/etc/kiln/agent.toml
                 install -m 0644 /mnt/kiln/kiln-node-agent.service /etc/systemd/system/
                 systemctl daemon-reload; systemctl enable --now kiln-node-agent",
            )
            .await
            .map(drop)
        };
        self.agent.get_or_try_init(install).await?;
        let listens = "/opt/kiln/bin/kiln-node-agent --report";
        self.machine.until("the agent", listens).await.map(drop)
    }

    /// Waits until the agent holds a warm sandbox of a learned shape and boots none.
    pub(crate) async fn expect_warm(&self) -> Result<()> {
        let holds = "/opt/kiln/bin/kiln-node-agent --report | tee /dev/stderr | \
             awk '$2 == \"(learned)\" { held += $4; boots += $5 } END { exit !(held == 1 && boots == 0) }'";
        let ready = self.machine.until("a warm sandbox", holds).await;
        match ready {
            Ok(_) => Ok(()),
            Err(e) => {
                let log = self
                    .sh("journalctl -u kiln-node-agent -n 30 -o cat")
                    .await?;
                Err(e.context(log))
            }
        }
    }

    /// Ids of the warm sandboxes.
    pub(crate) async fn warm(&self) -> Result<String> {
        self.sh("ls /run/kiln-agent/ready").await
    }

    /// Starts a Pod and an idle container in it, in a slice of its own.
    pub(crate) async fn pod(&self, name: &str) -> Result<Pod<'_>> {
        let slice = format!("kubepods-burstable-pod{name}.slice");
        let parent = format!("{BURSTABLE}/{slice}");
        let pod = json!({
            "metadata": {"name": name, "uid": name, "namespace": "default", "attempt": 1},
            "hostname": name,
            "log_directory": "/tmp/logs",
            "linux": {"cgroup_parent": parent, "security_context": {}},
        });
        let container = json!({
            "metadata": {"name": "c"},
            "image": {"image": BUSYBOX},
            "command": ["/bin/sh", "-c", IDLE],
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        // As runc's library makes it for a kubelet.
        let ids = self
            .sh(&format!(
                "set -e; mkdir -p /tmp/logs; cd /tmp\n\
                 busctl call {MANAGER} StartTransientUnit 'ssa(sv)a(sa(sv))' {slice} replace 8 \
                   Description s Pod Wants as 1 kubepods-burstable.slice MemoryAccounting b true \
                   CPUAccounting b true IOAccounting b true TasksAccounting b true \
                   DefaultDependencies b false MemoryMax t {MEMORY} 0 >/dev/null\n\
                 cat >{name}.json <<'END'\n{pod}\nEND\n\
                 cat >{name}-c.json <<'END'\n{container}\nEND\n\
                 pod=$(crictl runp -T 300s --runtime=gvisor {name}.json); echo $pod\n\
                 id=$(crictl create $pod {name}-c.json {name}.json); echo $id\n\
                 crictl start $id >/dev/null"
            ))
            .await
            .context(format!("Pod {name}"));
        let ids = match ids {
            Ok(ids) => ids,
            Err(e) => {
                let log = self.sh("journalctl -u containerd -n 30 -o cat").await?;
                return Err(e.context(log));
            }
        };
        let mut ids = ids.lines().map(str::to_owned);
        let mut next = || ids.next().context("no id");
        Ok(Pod {
            node: self,
            id: next()?,
            container: next()?,
            dir: format!("/sys/fs/cgroup{parent}"),
            slice,
        })
    }

    /// Sees to it that nothing of Kiln's is there: processes, mounts, cgroups. The network namespace
    /// of gofers is runsc's, and stays until the node is disabled.
    pub(crate) async fn expect_nothing(&self) -> Result<()> {
        let nothing = "left=$(pgrep -fa '[r]unsc|[s]him-kiln|[k]iln-node'; find /sys/fs/cgroup -name 'cri-containerd-*' -o -path '*kiln*' -type d; \
             grep -E '[k]iln|[r]unsc' /proc/mounts | grep -v '/null-netns '); [ -z \"$left\" ] || { echo \"$left\"; false; }";
        self.machine.until("an empty node", nothing).await.map(drop)
    }
}

/// Where systemd takes wishes.
pub(crate) const MANAGER: &str =
    "org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager";

impl Fixture for Node {
    /// With the machine goes all that was in it.
    async fn finish(self) -> Result<()> {
        Ok(())
    }

    fn log(&self) -> String {
        self.machine.log()
    }
}

/// A Pod with one container.
pub(crate) struct Pod<'a> {
    node: &'a Node,
    pub(crate) id: String,
    pub(crate) container: String,
    pub(crate) slice: String,
    /// The cgroup of its slice.
    dir: String,
}

impl Pod<'_> {
    /// The cgroup of its sandbox.
    pub(crate) fn cgroup(&self) -> String {
        format!("{}/cri-containerd-{}.scope", self.dir, self.id)
    }

    /// Runs a shell in its container.
    pub(crate) async fn exec(&self, script: &str) -> Result<String> {
        let words = format!("crictl exec -s {} sh -c '{script}'", self.container);
        self.node.sh(&words).await
    }

    /// Uses more memory than it may, and returns what becomes of the container.
    pub(crate) async fn exhaust(&self) -> Result<String> {
        self.exec("touch /tmp/exhaust").await?;
        let ended = format!(
            "state=$(crictl inspect {}); grep -q CONTAINER_EXITED <<<$state && grep -E '\"(reason|exitCode)\"' <<<$state",
            self.container
        );
        self.node
            .machine
            .until("the end of a container", &ended)
            .await
    }

    /// Whether its sandbox's processes are in its cgroup, and counted and limited there.
    pub(crate) async fn expect_accounted(&self) -> Result<()> {
        let (cgroup, id) = (self.cgroup(), &self.id);
        let found = self
            .node
            .sh(&format!(
                "cd {cgroup} && cat cgroup.procs | xargs -I% cat /proc/%/comm | sort | uniq -c; \
                 for f in memory.current memory.max pids.current cpu.max; do echo $f $(cat $f 2>&1); done; \
                 cat ../memory.max ../cgroup.subtree_control; \
                 systemctl show -p Delegate -p ControlGroup -p Slice cri-containerd-{id}.scope"
            ))
            .await?;
        let has = |file: &str| {
            let line = found.lines().find(|line| line.starts_with(file));
            line.is_some_and(|line| line.split_whitespace().nth(1).is_some_and(is_figure))
        };
        for file in ["memory.current", "memory.max", "pids.current", "cpu.max"] {
            ensure!(has(file), "no {file}: {found}");
        }
        ensure!(!found.contains("pids.current 0\n"), "empty: {found}");
        ensure!(found.contains(&MEMORY.to_string()), "{found}");
        ensure!(
            found.contains("Delegate=yes"),
            "no scope of systemd's: {found}"
        );
        ensure!(found.contains(&format!("Slice={}", self.slice)), "{found}");
        Ok(())
    }

    /// Removes it with its slice, as a kubelet does.
    pub(crate) async fn remove(self) -> Result<()> {
        let (id, slice, dir) = (&self.id, &self.slice, &self.dir);
        let removed = format!("crictl rmp -f {id} && systemctl stop {slice} && [ ! -e {dir} ]");
        self.node.sh(&removed).await?;
        // Not the shell that looks.
        let (first, rest) = id.split_at(1);
        let gone = format!("! pgrep -fa '[{first}]{rest}'");
        self.node
            .machine
            .until("the end of a Pod", &gone)
            .await
            .map(drop)
    }
}

fn is_figure(word: &str) -> bool {
    word == "max" || word.parse::<u64>().is_ok()
}

/// What is brought to the node, laid out as on its disk.
async fn bring(dir: &Path) -> Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace")?;
    for image in [BUSYBOX, PAUSE] {
        images::export(image, &dir.join("images")).await?;
    }
    let mut programs = vec![
        ("kiln", tools::ours("containerd-shim-kiln-v2")?),
        ("kiln", tools::pause()?),
        ("kiln", tools::ours("kiln-node-agent")?),
        ("bin", tools::ours("kilnctl")?),
        ("bin", tools::runsc()?),
    ];
    for name in ["crictl", "busybox"] {
        programs.push(("bin", tools::program(name)?));
    }
    for name in ["containerd", "containerd-shim-runc-v2"] {
        programs.push(("containerd", tools::program(name)?));
    }
    for (place, program) in programs {
        let target = dir
            .join(place)
            .join(program.file_name().unwrap_or_default());
        fs::create_dir_all(dir.join(place))?;
        // Debug information is half of a disk.
        let strip = Cmd::new(Path::new("strip")).args(["-o".as_ref(), target.as_os_str()]);
        strip.args([program.canonicalize()?]).run().await?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    }
    let unit = "kiln-node-agent.service";
    fs::copy(
        workspace.join("deploy/systemd").join(unit),
        dir.join("kiln").join(unit),
    )?;
    Ok(())
}
