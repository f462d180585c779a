// SPDX-License-Identifier: Apache-2.0

//! How critest's Pods came to their sandboxes, where an agent has held some for them.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result, ensure};
use kiln_agent_api::api::ReportResponse;
use kiln_tests::{node::Node, pod::is_late};

/// The handler whose Pods adopt.
pub(crate) const HANDLER: &str = "gvisor-warm";

/// How many sandboxes of the usual shape are held: specs have at most three Pods at a time, and
/// the next begins before those of the last are replaced.
const USUAL: u32 = 6;

/// Kernel parameters that specs set, which make a shape each.
const PARAMETERS: [(&str, &str); 2] = [
    ("kernel.shm_rmid_forced", "1"),
    ("fs.mqueue.msg_max", "100"),
];

/// How many sandboxes the agent holds.
pub(crate) const HELD: u32 = USUAL + PARAMETERS.len() as u32;

/// What the shim says of Pods on the host's network, which have no sandbox that could have been
/// booted before.
const INELIGIBLE: &str = "it has no network of its own";

/// What the shim says of a Pod with hostIPC: it has the node's `/dev/shm`, and no class names such a
/// shape. One spec makes one.
const UNKNOWN: &str = "no warm sandbox: unknown";
const WITH_HOST_IPC: usize = 1;

/// What containerd sets in every Pod (`enable_unprivileged_ports`, `enable_unprivileged_icmp`).
const BY_CONTAINERD: &str = "\"net.ipv4.ip_unprivileged_port_start\" = \"0\", \"net.ipv4.ping_group_range\" = \"0 2147483647\"";

/// The agent's configuration. It learns nothing: what it is not told to hold counts as a miss.
pub(crate) fn agent() -> String {
    let class = |warm: u32, sysctl: &str| {
        format!(
            "[[class]]\nname = \"gvisor\"\nwarm = {warm}\nsysctl = {{ {BY_CONTAINERD}{sysctl} }}\n"
        )
    };
    let others = PARAMETERS.map(|(key, value)| class(1, &format!(", {key:?} = {value:?}")));
    let usual = class(USUAL, "");
    format!(
        "[limits]\npause_ms = 0\nlearned = 0\n{usual}{}",
        others.concat()
    )
}

/// How the Pods of a run came to their sandboxes.
pub(crate) struct Adoptions {
    pods: usize,
    adopted: u64,
    /// Pods that started cold, by what the shim says of it.
    cold: BTreeMap<String, Vec<String>>,
    /// What the agent has counted.
    report: ReportResponse,
}

impl Adoptions {
    /// Of all Pods that the node has run, by the log of its containerd, in which those of the
    /// shims are.
    ///
    /// # Errors
    /// When the log cannot be read or the agent does not answer.
    pub(crate) async fn of(node: &Node) -> Result<Self> {
        let ran = node.log_lines("returns sandbox id")?;
        let adoptions = node.log_lines("msg=\"adopted warm-")?;
        let (mut adopted, mut cold) = (0, BTreeMap::<_, Vec<_>>::new());
        for line in &ran {
            let id = line.rsplit("sandbox id").next().context("no id")?;
            let id = id.trim_matches(['\\', '"', ' ']);
            let is_its = |line: &&String| line.contains(&format!("id={id}"));
            if adoptions.iter().any(|line| is_its(&line)) {
                adopted += 1;
                continue;
            }
            let why = node.why_cold(id).await?;
            cold.entry(why).or_default().push(line.clone());
        }
        Ok(Self {
            pods: ran.len(),
            adopted,
            cold,
            report: node.agent()?.report().await?,
        })
    }
}

impl Adoptions {
    /// Checks that every Pod that can adopt has adopted, and that the agent has counted the same.
    ///
    /// A busy machine makes the agent late for some of them, and what they tell it may get lost.
    ///
    /// # Errors
    /// Who has not, and what the shim says of it.
    pub(crate) fn check(&self) -> Result<()> {
        let unknown = self.cold.get(UNKNOWN).map_or(0, Vec::len);
        ensure!(
            unknown <= WITH_HOST_IPC,
            "shapes that are not held: {:?}",
            self.cold
        );
        let eligible = self
            .cold
            .iter()
            .filter(|(why, _)| ![INELIGIBLE, UNKNOWN].contains(&why.as_str()));
        let (late, others): (Vec<_>, Vec<_>) = eligible.partition(|(why, _)| is_late(why));
        ensure!(others.is_empty(), "Pods started cold: {others:?}");
        let late: u64 = late.iter().map(|(_, pods)| pods.len() as u64).sum();
        ensure!(
            self.adopted > late,
            "{} Pods adopted, and for {late} the agent was late",
            self.adopted
        );
        let classes = &self.report.classes;
        let adopted: u64 = classes.iter().map(|c| c.adopted).sum();
        let missed: u64 = classes.iter().map(|c| c.missed).sum();
        let counted = (adopted, missed, self.report.failed);
        // A word of an adoption may be lost to an agent that is late; most are not.
        let is_most = adopted <= self.adopted && adopted * 10 >= self.adopted * 9;
        ensure!(
            is_most && missed <= late + unknown as u64 && self.report.failed == 0,
            "the agent counts (adopted, missed, failed) {counted:?}, {} Pods adopted, and for {late} it was late",
            self.adopted
        );
        Ok(())
    }
}

impl fmt::Display for Adoptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} Pods adopted", self.adopted, self.pods)?;
        for (why, pods) in &self.cold {
            write!(f, ", {} started cold ({why})", pods.len())?;
        }
        Ok(())
    }
}
