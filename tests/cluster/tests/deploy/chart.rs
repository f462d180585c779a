// SPDX-License-Identifier: Apache-2.0

//! The Helm chart, beside the kustomization that it is made of.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use kiln_cluster::account::deploy;
use kiln_tests::{process::Cmd, tools};
use serde_json::{Value, json};

use crate::env::Env;

type Objects = BTreeMap<String, Value>;

/// The chart's objects with these values.
async fn render(env: &Env, values: &[&str]) -> Result<String> {
    let set = values.iter().flat_map(|value| ["--set", value]);
    template(env, &set.collect::<Vec<_>>()).await
}

/// What helm makes of the chart with these flags.
async fn template(env: &Env, flags: &[&str]) -> Result<String> {
    let chart = deploy().join("helm/kiln").display().to_string();
    let args = [&["template", "kiln", &chart], flags].concat();
    Cmd::new(&tools::program("helm")?)
        .args(args)
        .env("HOME", env.plane.dir())
        .run()
        .await
}

fn objects(text: &str) -> Result<Objects> {
    let all: Vec<Value> = serde_saphyr::from_multiple(text)?;
    let all = all.into_iter().filter(|o| !o.is_null());
    let titled = |o: Value| {
        (
            format!("{}/{}", name(&o["kind"]), name(&o["metadata"]["name"])),
            o,
        )
    };
    Ok(all.map(titled).collect())
}

fn name(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub(crate) async fn as_it_comes_it_is_the_base(env: &Env) -> Result<()> {
    let chart = objects(&render(env, &[]).await?)?;
    let base = deploy().join("base").display().to_string();
    let base = objects(&env.plane.kubectl(&["kustomize", &base]).await?)?;
    ensure!(base.len() > 15, "{:?}", base.keys());
    let titles = |of: &Objects| of.keys().cloned().collect::<Vec<_>>();
    ensure!(titles(&chart) == titles(&base), "{:?}", titles(&chart));
    for (title, object) in &base {
        ensure!(
            chart[title] == *object,
            "{title}: {} is not {object}",
            chart[title]
        );
    }
    Ok(())
}

pub(crate) async fn its_values_reach_the_objects(env: &Env) -> Result<()> {
    let values = [
        "images.registry=registry.example:5000/kiln/",
        "images.tag=v9",
        "images.pullPolicy=Always",
        "images.pullSecrets={secret}",
        "createNamespace=false",
        "runtimeClass=false",
        "controller.nodeSelector.pool=system",
        "controller.tolerations[0].key=system",
        "controller.resources.limits.memory=1Gi",
        "router.nodeSelector.pool=edge",
        "agent.nodeSelector.pool=sandboxes",
        "agent.tolerations[0].key=more",
        "agent.config=total = 9",
        "metrics.scrapeAnnotations=true",
        "metrics.serviceMonitor=true",
        "metrics.rules=true",
    ];
    let chart = objects(&render(env, &values).await?)?;
    for gone in ["Namespace/agent-sandbox-system", "RuntimeClass/gvisor"] {
        ensure!(!chart.contains_key(gone), "{gone}");
    }
    let at = |title: &str, path: &str| {
        let object = chart.get(title).with_context(|| title.to_owned())?;
        let found = object.pointer(path).cloned();
        found.with_context(|| format!("no {path} in {object}"))
    };
    let controller = "Deployment/agent-sandbox-controller";
    let router = "Deployment/sandbox-router-deployment";
    let agent = "DaemonSet/kiln-node-agent";
    let spec = "/spec/template/spec";
    for (title, path, expected) in [
        (
            controller,
            "/containers/0/image",
            json!("registry.example:5000/kiln/kiln-controller:v9"),
        ),
        (controller, "/containers/0/imagePullPolicy", json!("Always")),
        (controller, "/imagePullSecrets", json!([{"name": "secret"}])),
        (controller, "/nodeSelector", json!({"pool": "system"})),
        (controller, "/tolerations", json!([{"key": "system"}])),
        (
            controller,
            "/containers/0/resources",
            json!({"limits": {"memory": "1Gi"}}),
        ),
        (router, "/nodeSelector", json!({"pool": "edge"})),
        (
            router,
            "/containers/0/resources/limits/memory",
            json!("1Gi"),
        ),
        (
            agent,
            "/containers/0/image",
            json!("registry.example:5000/kiln/kiln-node-agent:v9"),
        ),
        (
            agent,
            "/nodeSelector",
            json!({"kubernetes.io/os": "linux", "pool": "sandboxes"}),
        ),
        (agent, "/tolerations/0/key", json!("sandbox.gke.io/runtime")),
        (agent, "/tolerations/1/key", json!("more")),
        (agent, "/containers/0/resources/requests/cpu", json!("50m")),
    ] {
        let found = at(title, &format!("{spec}{path}"))?;
        ensure!(found == expected, "{title} {path}: {found}");
    }
    for (title, port) in [(controller, "8080"), (agent, "9477")] {
        let found = at(title, "/spec/template/metadata/annotations")?;
        let expected = json!({"prometheus.io/scrape": "true", "prometheus.io/path": "/metrics",
            "prometheus.io/port": port});
        ensure!(found == expected, "{title}: {found}");
    }
    let config = at("ConfigMap/kiln-node-agent", "/data/agent.toml")?;
    ensure!(config == "total = 9", "{config}");
    at(
        "ServiceMonitor/agent-sandbox-controller",
        "/spec/endpoints/0/port",
    )?;
    at(
        "PodMonitor/kiln-node-agent",
        "/spec/podMetricsEndpoints/0/port",
    )?;
    at(
        "PodMonitor/sandbox-router",
        "/spec/podMetricsEndpoints/0/port",
    )?;
    let alerts = at("PrometheusRule/kiln", "/spec/groups/0/rules/0/alert")?;
    ensure!(alerts.is_string(), "{alerts}");
    Ok(())
}

pub(crate) async fn values_of_a_wrong_type_are_refused(env: &Env) -> Result<()> {
    let file = env.plane.dir().join("values.yaml");
    fs::write(&file, "images: {tag: 1.10}\n")?;
    let file = file.display().to_string();
    for (flags, words) in [
        (
            &["--set", "images.tag=20261130"][..],
            "'/images/tag': got number, want string",
        ),
        (
            &["--values", &file],
            "'/images/tag': got number, want string",
        ),
        (
            &["--set", "images.registry=5000"],
            "'/images/registry': got number, want string",
        ),
        (&["--set-string", "images.tag=a:b"], "'/images/tag'"),
        (&["--set", "images=null"], "missing property 'images'"),
        (&["--set", "agent=null"], "missing property 'agent'"),
        (&["--set", "metrics=null"], "missing property 'metrics'"),
        (
            &["--set", "createNamespace=null"],
            "missing property 'createNamespace'",
        ),
        (
            &["--set", "controller.nodeSelector.a=1"],
            "'/controller/nodeSelector/a'",
        ),
        (
            &["--set", "image.tag=v1"],
            "additional properties 'image' not allowed",
        ),
    ] {
        let refused = template(env, flags).await.err();
        let refused = refused.map(|e| format!("{e:#}")).unwrap_or_default();
        ensure!(refused.contains(words), "{flags:?}: {refused:?}");
    }
    for (flags, image) in [
        (
            &["--set-string", "images.tag=20261130"][..],
            "kiln-controller:20261130",
        ),
        (
            &["--set", "images.registry=null,images.tag=null"],
            "kiln-controller:dev",
        ),
        (
            &["--set", "router.resources=null,global.a=b,enabled=true"],
            "kiln-controller:dev",
        ),
    ] {
        let chart = objects(&template(env, flags).await?)?;
        let controller = &chart["Deployment/agent-sandbox-controller"];
        let found = &controller["spec"]["template"]["spec"]["containers"][0]["image"];
        ensure!(found == image, "{flags:?}: {found}");
    }
    Ok(())
}

pub(crate) async fn the_apiserver_accepts_it(env: &Env) -> Result<()> {
    let others = [
        "images.tag=v9",
        "metrics.scrapeAnnotations=true",
        "images.pullSecrets={s}",
    ];
    for values in [&[][..], &others] {
        let objects = render(env, values).await?;
        let apply = "apply --server-side --force-conflicts --dry-run=server --validate=strict -f -";
        let apply: Vec<&str> = apply.split(' ').collect();
        env.plane.kubectl_with(&apply, &objects).await?;
    }
    Ok(())
}
