// SPDX-License-Identifier: Apache-2.0

//! A Pod in a virtual machine of Kata's, where the machine can run one. Elsewhere it says what is
//! missing.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::ExitCode,
};

use anyhow::{Result, ensure};
use kiln_tests::{
    node::{Kata, Node, NodeOpts},
    suite::Cases,
};

/// Where our shim looks for Kata's, unless it is told.
const SHIMS: [&str; 4] = [
    "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2",
    "/opt/kata/bin/containerd-shim-kata-v2",
    "/usr/local/bin/containerd-shim-kata-v2",
    "/usr/bin/containerd-shim-kata-v2",
];

/// New for every kernel that boots.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

fn main() -> ExitCode {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let has_kata = SHIMS.iter().any(|p| Path::new(p).is_file());
    if kvm.is_err() || !has_kata {
        let why = "skipped, because there is no /dev/kvm, or no Kata is installed";
        return match writeln!(std::io::stdout(), "kata-e2e: {why}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let mut cases = Cases::<Node>::new();
    cases.add_alone(
        "a_pod_has_a_kernel_of_its_own",
        a_pod_has_a_kernel_of_its_own,
    );
    let opts = || NodeOpts {
        kata: Some(Kata::Installed),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}

async fn a_pod_has_a_kernel_of_its_own(node: &Node) -> Result<()> {
    let pod = node.pod("kata").run().await?;
    let inside = pod.idle().start().await?.sh(&format!("cat {BOOT}")).await?;
    let host = fs::read_to_string(BOOT)?;
    ensure!(inside.trim() != host.trim(), "the kernel is the host's");
    pod.remove().await
}
