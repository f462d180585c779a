// SPDX-License-Identifier: Apache-2.0

//! Agent Sandbox on the cluster.

use std::time::Duration;

use anyhow::Result;
use kiln_cluster::mission::{Audience, Mission};

use crate::env::Env;

/// The manifests of the documentation, in its order: the claim gets a Pod that ran before it,
/// every Pod is on gVisor and in a sandbox that was booted before the Pod was.
pub(crate) async fn the_manifests_word_for_word(env: &Env) -> Result<()> {
    Mission::new(&env.private, &mut Nobody).run().await
}

/// Looks at results only.
struct Nobody;

impl Audience for Nobody {
    fn chapter(&mut self, _: &str) {}
    fn ran(&mut self, _: &str, _: &str) {}
    fn holds(&mut self, _: &str, _: Duration) {}
}
