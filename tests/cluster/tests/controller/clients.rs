// SPDX-License-Identifier: Apache-2.0

//! Upstream's newest Python client, unmodified, with what is between it, the apiserver and the
//! controller. How it reaches into sandboxes is for suite `cluster`.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use kiln_cluster::{python, standin::FATE};
use kiln_crds::SandboxWarmPool;
use serde_json::json;

use crate::env::Env;

/// Of those that `tests/deps/install.sh` installs, the first that names claims.
const VERSION: &str = "1.0.8";

/// How long one run may take.
const LIFE: Duration = Duration::from_secs(240);

pub(crate) async fn claims_of_upstreams_are_named_taken_over_and_ended(env: &Env) -> Result<()> {
    for client in ["blocking", "async"] {
        let ns = env.namespace().await?;
        ns.template("t", json!({"envVarsInjectionPolicy": "Allowed"}))
            .await?;
        for (template, fate) in [("slow", "slow:1500"), ("never", "unready")] {
            let fate = json!({"podTemplate": {"metadata": {"annotations": {FATE: fate}}}});
            ns.template(template, fate).await?;
            let pool = json!({"replicas": 0, "sandboxTemplateRef": {"name": template}});
            ns.make::<SandboxWarmPool>(template, json!({ "spec": pool }))
                .await?;
        }
        ns.pool("p", "t", 2).await?;
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/controller/client_claims.py");
        let (plane, home) = (&env.plane, env.plane.dir());
        let run = python::client(VERSION, &script, plane.kubeconfig(), home)?
            .args([client, &ns.name])
            .deadline(LIFE);
        run.run()
            .await
            .with_context(|| format!("{client} client"))?;
    }
    Ok(())
}
