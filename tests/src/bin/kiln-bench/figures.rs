// SPDX-License-Identifier: Apache-2.0

//! What is measured, and what we promise of it.
//!
//! CPU time (`*_cpu_ms`) is that of containerd, the shims, and the runtime's and CNI's commands:
//! what a Pod costs the node beside itself. Memory is that of the *shim layer*: shims and what
//! they keep running beside them, without sentries and gofers. 1 MB is 10^6 bytes.

/// One figure.
#[derive(Debug)]
pub(crate) struct Figure {
    /// Its key in the JSON file.
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) about: &'static str,
    pub(crate) bound: Option<Bound>,
}

/// What our shim must not exceed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bound {
    /// Our median.
    Ours(f64),
    /// Our median as a part of the Go shim's.
    Ratio(f64),
}

const fn figure(name: &'static str, unit: &'static str, about: &'static str) -> Figure {
    Figure {
        name,
        unit,
        about,
        bound: None,
    }
}

impl Figure {
    const fn at_most(self, most: f64) -> Self {
        Self {
            bound: Some(Bound::Ours(most)),
            ..self
        }
    }

    const fn ratio(self, most: f64) -> Self {
        Self {
            bound: Some(Bound::Ratio(most)),
            ..self
        }
    }
}

pub(crate) static RUNP: Figure = figure("runp_ms", "ms", "RunPodSandbox");
pub(crate) static RUNP_CPU: Figure = figure("runp_cpu_ms", "ms", "RunPodSandbox");
pub(crate) static CREATE_START: Figure =
    figure("create_start_ms", "ms", "CreateContainer, StartContainer");
pub(crate) static CREATE_START_CPU: Figure = figure(
    "create_start_cpu_ms",
    "ms",
    "CreateContainer, StartContainer",
);
pub(crate) static FIRST_OUTPUT: Figure = figure(
    "first_output_ms",
    "ms",
    "CreateContainer to the first line in the log",
)
.ratio(0.85);
pub(crate) static EXEC: Figure = figure("exec_ms", "ms", "ExecSync of `true`").ratio(0.35);
pub(crate) static EXEC_CPU: Figure = figure("exec_cpu_ms", "ms", "ExecSync of `true`").ratio(0.3);
pub(crate) static STATS: Figure = figure("stats_ms", "ms", "ContainerStats");
pub(crate) static STATS_CPU: Figure = figure("stats_cpu_ms", "ms", "ContainerStats").ratio(0.15);
pub(crate) static STOP: Figure = figure("stop_ms", "ms", "StopContainer without grace");
pub(crate) static TEARDOWN: Figure = figure(
    "teardown_ms",
    "ms",
    "StopContainer to the end of RemovePodSandbox",
)
.ratio(0.7);
pub(crate) static TEARDOWN_CPU: Figure =
    figure("teardown_cpu_ms", "ms", "the same, until nothing is left");
pub(crate) static LOG_CPU: Figure = figure(
    "log50mb_cpu_ms",
    "ms",
    "50 MB of output, with containerd's log",
);
pub(crate) static LOG_SHIM_CPU: Figure = figure(
    "log50mb_shim_cpu_ms",
    "ms",
    "50 MB of output, the shim alone",
);
pub(crate) static RSS: Figure =
    figure("shim_rss_mb", "MB", "shim layer of a Pod with 1 container").at_most(5.0);
pub(crate) static PSS: Figure = figure("shim_pss_mb", "MB", "the same, shared pages divided");
pub(crate) static ANON: Figure = figure("shim_anon_mb", "MB", "the same, anonymous").at_most(2.0);
pub(crate) static RSS_EXECS: Figure = figure("rss_10exec_mb", "MB", "shim layer after 10 execs");
pub(crate) static RSS_IN_EXEC: Figure = figure(
    "rss_in_exec_mb",
    "MB",
    "shim layer, 4 containers, an exec in flight",
);
pub(crate) static RSS_4CTR: Figure =
    figure("rss_4ctr_mb", "MB", "shim layer of a Pod with 4 containers");
pub(crate) static SATELLITES: Figure = figure(
    "satellites",
    "processes",
    "beside the shim, for a Pod with 1 container",
)
.at_most(0.0);
pub(crate) static SATELLITES_IN_EXEC: Figure = figure(
    "satellites_in_exec",
    "processes",
    "the same, 4 containers, an exec in flight",
);
pub(crate) static CLI_RUNS: Figure =
    figure("cli_runs", "runs", "of runsc, 1 container up and down").at_most(6.0);
pub(crate) static PARALLEL_UP: Figure = figure("parallel20_s", "s", "20 Pods at a time: up");
pub(crate) static PARALLEL_DOWN: Figure =
    figure("parallel20_down_s", "s", "20 Pods at a time: down");
pub(crate) static PARALLEL_MEM: Figure = figure(
    "parallel20_mem_mb",
    "MB",
    "shim layers of 20 Pods, shared pages divided",
)
.ratio(0.7);

/// All figures, in the order in which they are shown.
pub(crate) static ALL: [&Figure; 26] = [
    &RUNP,
    &RUNP_CPU,
    &CREATE_START,
    &CREATE_START_CPU,
    &FIRST_OUTPUT,
    &EXEC,
    &EXEC_CPU,
    &STATS,
    &STATS_CPU,
    &STOP,
    &TEARDOWN,
    &TEARDOWN_CPU,
    &LOG_CPU,
    &LOG_SHIM_CPU,
    &RSS,
    &PSS,
    &ANON,
    &RSS_EXECS,
    &RSS_4CTR,
    &RSS_IN_EXEC,
    &SATELLITES,
    &SATELLITES_IN_EXEC,
    &CLI_RUNS,
    &PARALLEL_UP,
    &PARALLEL_DOWN,
    &PARALLEL_MEM,
];
