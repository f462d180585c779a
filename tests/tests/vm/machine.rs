// SPDX-License-Identifier: Apache-2.0

//! A virtual machine of QEMU's: booted from the disk of `tests/deps/install.sh vm`, which stays as it
//! is, with another disk of what a test brings. Its network leads nowhere. With KVM where a machine
//! comes up with it, which more is needed for than the device; else emulated.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::guest::{Guest, Output};
use anyhow::{Result, bail, ensure};
use kiln_tests::{
    place::Place,
    process::{Background, Cmd},
    tools,
};

/// How long a machine may take to come up by KVM before it is emulated instead.
const KVM: Duration = Duration::from_secs(60);

/// How long one that is emulated may take, beside others on the same CPUs.
const BOOT: Duration = Duration::from_secs(600);

/// How long a command in the machine may take.
const COMMAND: Duration = Duration::from_secs(420);

/// What QEMU writes of a guest that KVM cannot go on with.
const KVM_FAILED: &str = "KVM internal error";

/// Who executes the machine's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accelerator {
    Kvm,
    Emulation,
}

/// A machine that is up. Dropping it ends it.
pub(crate) struct Machine {
    /// QEMU's cgroup and directory. It goes with all in it, also when the suite is told to end.
    place: Place,
    qemu: Background,
    guest: Guest,
}

impl Machine {
    /// Boots one in `place`, whose second disk has the files of `brought`.
    pub(crate) async fn boot(place: Place, brought: &Path) -> Result<Self> {
        make_disk(brought, &disk(place.dir())).await?;
        let may_kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if may_kvm {
            let qemu = start(&place, Accelerator::Kvm)?;
            let guest = Guest::new(port(place.dir()));
            if comes_up(&qemu, &guest, KVM).await {
                return Ok(Self { place, qemu, guest });
            }
        }
        let qemu = start(&place, Accelerator::Emulation)?;
        let guest = Guest::new(port(place.dir()));
        let this = Self { place, qemu, guest };
        ensure!(
            comes_up(&this.qemu, &this.guest, BOOT).await,
            "the machine does not come up: {}",
            this.log()
        );
        Ok(this)
    }

    /// Runs a script, and returns what it left, however it ended.
    pub(crate) async fn output(&self, script: &str) -> Result<Output> {
        self.guest.run(script, COMMAND).await
    }

    /// Runs a script that succeeds, and returns what it wrote.
    pub(crate) async fn sh(&self, script: &str) -> Result<String> {
        let output = self.output(script).await?;
        if output.code != 0 {
            bail!("{script}: {}: {}{}", output.code, output.errors, output.out);
        }
        Ok(output.out)
    }

    /// Runs a script until it succeeds.
    pub(crate) async fn until(&self, what: &str, script: &str) -> Result<String> {
        let begun = Instant::now();
        loop {
            let output = self.output(script).await?;
            if output.code == 0 {
                return Ok(output.out);
            }
            ensure!(
                begun.elapsed() < COMMAND,
                "{what}: not within {COMMAND:?}: {}{}",
                output.errors,
                output.out
            );
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Boots it once more, as an operator does.
    pub(crate) async fn reboot(&self) -> Result<()> {
        const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";
        let before = self.sh(BOOT_ID).await?;
        // Later, so that it is answered.
        self.sh("systemd-run -q --on-active=1 systemctl reboot")
            .await?;
        let begun = Instant::now();
        while begun.elapsed() < BOOT {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if self.guest.is_there().await && self.sh(BOOT_ID).await.is_ok_and(|id| id != before) {
                return Ok(());
            }
        }
        bail!("the machine does not come back: {}", self.log())
    }

    /// What QEMU and the machine's console have to say.
    pub(crate) fn log(&self) -> String {
        let console = fs::read(console(self.place.dir())).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<_> = console.lines().collect();
        let end = lines[lines.len().saturating_sub(30)..].join("\n");
        format!(
            "{}\n--- end of the machine's console\n{end}",
            self.qemu.text()
        )
    }
}

/// Makes a disk of the files in `from`.
async fn make_disk(from: &Path, disk: &Path) -> Result<()> {
    let size = Cmd::new(Path::new("du"))
        .args(["-Lsm".as_ref(), from.as_os_str()])
        .run()
        .await?;
    let size: u64 = size.split_whitespace().next().unwrap_or_default().parse()?;
    Cmd::new(&tools::program("mke2fs").or_else(|_| in_sbin("mke2fs"))?)
        .args(["-q", "-t", "ext4", "-d"])
        .args([from.as_os_str(), disk.as_os_str()])
        .args([format!("{}M", size * 5 / 4 + 32)])
        .run()
        .await
        .map(drop)
}

/// Where programs are that not everybody's `PATH` has.
fn in_sbin(name: &str) -> Result<PathBuf> {
    let path = Path::new("/usr/sbin").join(name);
    ensure!(
        path.exists(),
        "{name} is not there: run tests/deps/install.sh vm"
    );
    Ok(path)
}

fn disk(dir: &Path) -> PathBuf {
    dir.join("disk")
}

fn port(dir: &Path) -> PathBuf {
    dir.join("port")
}

fn console(dir: &Path) -> PathBuf {
    dir.join("console")
}

fn start(place: &Place, accelerator: Accelerator) -> Result<Background> {
    let dir = place.dir();
    let image = tools::cache()?.join("vm");
    ensure!(
        image.join("root.img").exists(),
        "no {}: run tests/deps/install.sh vm",
        image.display()
    );
    let with = |words: &str, path: &Path| {
        let mut all = OsString::from(words);
        all.push(path);
        all
    };
    let accelerated: [&str; 4] = match accelerator {
        // Without what a hypervisor of the machine's own may keep from it.
        Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host,arch-capabilities=off"],
        Accelerator::Emulation => ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"],
    };
    // A machine that was given up may have left one, on which nobody listens.
    fs::remove_file(port(dir)).ok();
    Cmd::new(&tools::program("qemu-system-x86_64")?)
        .args(accelerated)
        .args(["-smp", "2", "-m", "3072", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-kernel"])
        .args([image.join("vmlinuz").as_os_str(), "-initrd".as_ref()])
        .args([image.join("initrd.img").as_os_str(), "-append".as_ref()])
        .args(["root=/dev/vda rw console=ttyS0,115200 quiet mitigations=off"])
        .args(["-serial".into(), with("file:", &console(dir))])
        // Writes go into a file that has no name, and with it when it ends.
        .args(["-snapshot", "-drive"])
        .args([with("if=virtio,format=raw,file=", &image.join("root.img"))])
        .args([
            "-drive".into(),
            with("if=virtio,format=raw,file=", &disk(dir)),
        ])
        .args(["-netdev", "user,id=net,restrict=on", "-device"])
        .args([
            "virtio-net-pci,netdev=net,romfile=",
            "-device",
            "virtio-rng-pci",
        ])
        .args([
            "-chardev".into(),
            with("socket,id=port,server=on,wait=off,path=", &port(dir)),
        ])
        .args(["-device", "virtio-serial", "-device"])
        .args(["virtserialport,chardev=port,name=org.qemu.guest_agent.0"])
        .cgroup(place.cgroup())
        .background(&dir.join("qemu.log"))
}

/// Whether the machine answers in time.
async fn comes_up(qemu: &Background, guest: &Guest, limit: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < limit && !qemu.text().contains(KVM_FAILED) {
        if guest.is_there().await {
            return true;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    false
}
