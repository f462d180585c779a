// SPDX-License-Identifier: Apache-2.0

//! Leadership: one Lease, which one controller holds at a time.
//!
//! [`LeaseManager`] takes and renews it, by server-side applies that conflict between controllers:
//! each needs a field manager of its own. What it does not say is that it cannot renew. So a leader
//! also looks at the Lease itself, and ends before another may lead.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{Api, Client};
use kube_lease_manager::{
    DurationSeconds, LeaseManager, LeaseManagerBuilder, LeaseManagerError, LeaseParams,
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tracing::warn;

use crate::error;

/// Name of the Lease: that of upstream's controller, `LeaderElectionID` of its
/// `cmd/agent-sandbox-controller/manageroptions.go`. So the two never lead at the same time in the
/// namespace that both are installed in.
const NAME: &str = "a3317529.agent-sandbox.x-k8s.io";
/// Seconds for which it holds, and before its end at which it is renewed: early enough to try more
/// than once.
const SECONDS: DurationSeconds = 15;
const RENEW_BEFORE: DurationSeconds = 10;
/// Pause after a renewal that has failed.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a leader looks at its Lease, and how long it waits for an answer.
const POLL: Duration = Duration::from_secs(2);

/// A controller's part in the election.
pub(crate) struct Candidate {
    leads: watch::Receiver<bool>,
    renewing: JoinHandle<()>,
    leases: Api<Lease>,
    identity: String,
}

impl Candidate {
    pub(crate) async fn new(client: Client, namespace: &str) -> Result<Self, LeaseManagerError> {
        let identity = identity();
        let leases = Api::namespaced(client.clone(), namespace);
        let manager = LeaseManagerBuilder::new(client, NAME)
            .with_namespace(namespace)
            .with_parameters(LeaseParams::new(&identity, SECONDS, RENEW_BEFORE))
            .build()
            .await?;
        let (sender, leads) = watch::channel(false);
        Ok(Self {
            leads,
            renewing: tokio::spawn(keep(manager, sender)),
            leases,
            identity,
        })
    }

    /// Waits until this is the leader.
    ///
    /// # Errors
    /// When nobody takes the Lease any more.
    pub(crate) async fn won(&mut self) -> Result<(), watch::error::RecvError> {
        self.leads.wait_for(|leads| *leads).await.map(drop)
    }

    /// Waits until another may lead.
    pub(crate) async fn lost(&mut self) {
        tokio::select! {
            // The channel ends with its task: then nobody renews the Lease.
            _ = self.leads.wait_for(|leads| !*leads) => {}
            () = ended(&self.leases, &self.identity) => {}
        }
    }

    /// Gives the Lease up, so that the next one need not wait for its end.
    pub(crate) async fn leave(self) {
        drop(self.leads);
        if let Err(e) = self.renewing.await {
            warn!("give up the Lease: {e}");
        }
    }
}

/// Who this is, as upstream says it: the host, and what tells one run on it from the next.
fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{:032x}", host.trim(), rand::random::<u128>())
}

/// Takes the Lease when it can, renews it, and says so, until nobody listens any more.
async fn keep(manager: LeaseManager, leads: watch::Sender<bool>) {
    loop {
        let changed = tokio::select! {
            changed = manager.changed() => changed,
            () = leads.closed() => break,
        };
        match changed {
            Ok(now) => {
                leads.send_replace(now);
            }
            Err(e) => {
                warn!("Lease: {e}");
                sleep(PAUSE).await;
            }
        }
    }
    if let Err(e) = manager.release().await {
        warn!("give up the Lease: {e}");
    }
}

/// Waits until the Lease is another's, or has come to its end.
async fn ended(leases: &Api<Lease>, identity: &str) {
    let mut seen = Seen::new(Instant::now());
    loop {
        let asked = Instant::now();
        let spec = match timeout(POLL, leases.get(NAME)).await {
            Ok(Ok(lease)) => Some(lease.spec.unwrap_or_default()),
            Ok(Err(e)) if error::is_not_found(&e) => Some(LeaseSpec::default()),
            // Whatever the reason: it may be the one for which the Lease is not renewed either.
            Ok(Err(_)) | Err(_) => None,
        };
        if !seen.holds(identity, spec, asked, Instant::now()) {
            return;
        }
        sleep(POLL).await;
    }
}

/// What a leader has seen of its Lease. Only that its times change counts, and our own clock.
struct Seen {
    renewed: Option<MicroTime>,
    /// When what was answered last had been asked.
    asked: Instant,
    /// From when the Lease holds at least.
    since: Instant,
}

impl Seen {
    fn new(now: Instant) -> Self {
        Self {
            renewed: None,
            asked: now,
            since: now,
        }
    }

    /// Whether `identity` holds the Lease at `now`, by the answer, if there was one, to what was
    /// `asked`.
    fn holds(
        &mut self,
        identity: &str,
        answer: Option<LeaseSpec>,
        asked: Instant,
        now: Instant,
    ) -> bool {
        if let Some(spec) = answer {
            if spec.holder_identity.as_deref() != Some(identity) {
                return false;
            }
            if spec.renew_time != self.renewed {
                self.renewed = spec.renew_time;
                // It was renewed after it had been looked at before, and maybe just then.
                self.since = self.asked;
            }
            self.asked = asked;
        }
        now.duration_since(self.since) < Duration::from_secs(SECONDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(by: &str, renewed: &str) -> Option<LeaseSpec> {
        Some(LeaseSpec {
            holder_identity: Some(by.to_owned()),
            renew_time: Some(MicroTime(renewed.parse().unwrap())),
            ..LeaseSpec::default()
        })
    }

    #[test]
    fn a_lease_holds_for_its_time_after_it_was_renewed_and_no_longer() {
        const FIRST: &str = "2026-01-01T00:00:00Z";
        // By another clock, and backwards: only that it differs counts.
        const SECOND: &str = "2025-01-01T00:00:00Z";
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut seen = Seen::new(start);
        for (second, answer, expected) in [
            (2, held("us", FIRST), true),
            (8, held("us", FIRST), true),
            (10, held("us", SECOND), true),
            // Renewed after the eighth second.
            (22, None, true),
            (23, None, false),
            (23, held("us", SECOND), false),
            (24, held("us", FIRST), true),
            (25, held("them", FIRST), false),
            (25, Some(LeaseSpec::default()), false),
        ] {
            let holds = seen.holds("us", answer, at(second), at(second));
            assert_eq!(holds, expected, "{second}");
        }
    }
}
