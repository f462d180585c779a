// SPDX-License-Identifier: Apache-2.0

//! What a node must have before Pods can run in sandboxes on it, and what to do where it lacks
//! something.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use kiln_agent_api::NodeConfig;
use kiln_node_install::{CRI, RUNTIME_TYPE, SHIM, containerd_version as containerd_version_of};
use runsc_wrapper::Config as RuntimeConfig;
use serde::Serialize;
use tokio::task::spawn_blocking;

use super::facts::{self, Space};
use crate::{
    args::{NodeFormat, Preflight},
    output::{say, table, write},
};

/// containerd's own file when it was started with no other.
const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";

/// The oldest kernel: openat2(2) came with it.
const KERNEL: (u32, u32) = (5, 6);

/// The oldest release of runsc that is tested.
const RUNSC: u32 = 20_240_101;

/// Bytes that the agent leaves to the node by default.
const MEMORY: u64 = 512 << 20;

/// Where the agent keeps its state unless told otherwise.
const STATE: &str = "/run/kiln-agent";

/// Bytes below which images and sandboxes have no room.
const DISK: u64 = 1 << 30;

/// Whether something is as it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Works, but not well.
    Warning,
    /// Pods in sandboxes cannot run.
    Missing,
}

/// What was looked at, and found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    check: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do; empty where nothing is to be done.
    advice: String,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Ok,
            found: found.into(),
            advice: String::new(),
        }
    }

    fn missing(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self {
            verdict: Verdict::Missing,
            advice: advice.to_owned(),
            ..Self::ok(check, found)
        }
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self {
            verdict: Verdict::Warning,
            ..Self::missing(check, found, advice)
        }
    }
}

/// Looks at everything, and prints what was found.
///
/// # Errors
/// Only those of this program itself; what the node lacks is in what is printed, and makes the
/// exit code 1.
pub(crate) async fn run(args: &Preflight) -> Result<ExitCode> {
    let mut checks = spawn_blocking(machine).await?;
    let (of_containerd, handler) = containerd(args).await?;
    checks.extend(of_containerd);
    checks.extend(runtime(args, handler.and_then(|h| h.config)).await?);
    match args.output {
        NodeFormat::Table => write(&text(&checks)),
        NodeFormat::Json => say(&serde_json::to_string_pretty(&checks)?),
    }
    let lacks = checks.iter().any(|c| c.verdict == Verdict::Missing);
    Ok(if lacks {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn text(checks: &[Check]) -> String {
    let mut rows = vec![["CHECK", "RESULT", "FOUND", "WHAT TO DO"].map(str::to_owned)];
    rows.extend(checks.iter().map(|c| {
        let verdict = format!("{:?}", c.verdict).to_lowercase();
        [
            c.check.to_owned(),
            verdict,
            c.found.clone(),
            c.advice.clone(),
        ]
    }));
    table(&rows)
}

/// The machine and its kernel. Blocks.
fn machine() -> Vec<Check> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let (version, controllers) = facts::cgroup_controllers();
    let namespaces = fs::read_to_string("/proc/sys/user/max_user_namespaces");
    vec![
        root(nix::unistd::geteuid().is_root()),
        architecture(env::consts::ARCH),
        kernel(release.trim()),
        cgroup(version, &controllers),
        proc(facts::proc_options().as_deref()),
        user_namespaces(namespaces.ok().as_deref().map(str::trim)),
        memory(facts::available_memory()),
        disk("disk", "/run", facts::space(Path::new("/run")), 64 << 20),
        agent_state(facts::is_noexec(Path::new(STATE))),
    ]
}

fn root(is_root: bool) -> Check {
    match is_root {
        true => Check::ok("root", "yes"),
        false => Check::missing(
            "root",
            "no",
            "run this as root: it looks as shim and agent do",
        ),
    }
}

fn architecture(name: &str) -> Check {
    match name {
        "x86_64" | "aarch64" => Check::ok("architecture", name),
        _ => Check::missing("architecture", name, "gVisor runs on x86_64 and aarch64"),
    }
}

fn kernel(release: &str) -> Check {
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|n| n.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= KERNEL => Check::ok("kernel", release),
        _ => Check::missing("kernel", release, "use a kernel of 5.6 or newer"),
    }
}

fn cgroup(version: u8, controllers: &[String]) -> Check {
    let lacking: Vec<&str> = ["cpu", "memory", "pids"]
        .into_iter()
        .filter(|c| !controllers.iter().any(|found| found == c))
        .collect();
    let found = format!("version {version}");
    match lacking.is_empty() {
        true => Check::ok("cgroup", found),
        false => Check::missing(
            "cgroup",
            format!("{found} without {}", lacking.join(", ")),
            "mount /sys/fs/cgroup, and enable these controllers on the kernel's command line",
        ),
    }
}

fn proc(options: Option<&str>) -> Check {
    let Some(options) = options else {
        return Check::missing("/proc", "not mounted", "mount -t proc proc /proc");
    };
    let hides = options.split(',').any(|o| {
        o.strip_prefix("hidepid=")
            .is_some_and(|v| !matches!(v, "0" | "off"))
    });
    match hides {
        false => Check::ok("/proc", "mounted"),
        true => Check::warning(
            "/proc",
            options,
            "mount it without hidepid: sentries run as another user",
        ),
    }
}

fn user_namespaces(limit: Option<&str>) -> Check {
    match limit {
        Some("0") | None => Check::missing(
            "user namespaces",
            limit.unwrap_or("none"),
            "sysctl -w user.max_user_namespaces=15000: sentries have one each",
        ),
        Some(limit) => Check::ok("user namespaces", format!("up to {limit}")),
    }
}

fn memory(available: Option<u64>) -> Check {
    let found = available.map_or("unknown".to_owned(), size);
    match available {
        Some(bytes) if bytes >= MEMORY => Check::ok("memory", format!("{found} available")),
        _ => Check::warning(
            "memory",
            found,
            "below the agent's memory_floor of 512 MiB nothing is booted ahead",
        ),
    }
}

fn disk(check: &'static str, path: &str, space: Option<Space>, least: u64) -> Check {
    let Some(Space { free, total }) = space else {
        return Check::missing(check, format!("{path} cannot be looked at"), "mount it");
    };
    let found = format!("{} of {} free in {path}", size(free), size(total));
    if free < least {
        return Check::missing(check, found, "make room");
    }
    // Where kubelet evicts Pods unless told otherwise: imagefs.available<15%.
    match free < total / 100 * 15 {
        true => Check::warning(check, found, "below 15% the kubelet evicts Pods"),
        false => Check::ok(check, found),
    }
}

/// The agent's state, which may be where nothing can be executed: Debian and Ubuntu mount `/run`
/// so.
fn agent_state(is_noexec: Option<bool>) -> Check {
    const CHECK: &str = "agent's state";
    match is_noexec {
        None => Check::missing(CHECK, format!("{STATE} cannot be looked at"), "mount /run"),
        Some(false) => Check::ok(CHECK, STATE),
        Some(true) => Check::ok(
            CHECK,
            format!("{STATE}, noexec: the agent mounts a tmpfs there for what sandboxes execute"),
        ),
    }
}

/// A program that is there, and whether it can be executed from where it lies.
fn program(check: &'static str, path: &Path, is_noexec: Option<bool>) -> Check {
    let found = path.display().to_string();
    match is_noexec {
        Some(true) => Check::missing(
            check,
            format!("{found}, on a file system that is mounted noexec"),
            "mount it without noexec, or install the program elsewhere",
        ),
        _ => Check::ok(check, found),
    }
}

fn size(bytes: u64) -> String {
    match bytes >> 30 {
        0 => format!("{} MiB", bytes >> 20),
        gib => format!("{gib} GiB"),
    }
}

/// containerd's handler, as far as it says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Handler {
    runtime_type: String,
    program: Option<PathBuf>,
    config: Option<PathBuf>,
}

/// containerd and its configuration.
async fn containerd(args: &Preflight) -> Result<(Vec<Check>, Option<Handler>)> {
    let given = args.containerd.clone();
    let found = spawn_blocking(move || {
        let running = facts::running_containerd().filter(|r| {
            given
                .as_ref()
                .is_none_or(|given| given.canonicalize().ok().as_ref() == Some(&r.program))
        });
        let program = given
            .or_else(|| running.as_ref().map(|r| r.program.clone()))
            .or_else(|| facts::find_program("containerd", &[]));
        (program, running)
    });
    let (Some(program), running) = found.await? else {
        let check = Check::missing(
            "containerd",
            "none runs, and none is in PATH",
            "install containerd 1.7 or newer, or name it by --containerd",
        );
        return Ok((vec![check], None));
    };
    let words = facts::ask(&program, &["--version"]).await;
    let mut checks = vec![match &words {
        Ok(words) => containerd_version(words, running.is_some()),
        Err(e) => Check::missing("containerd", format!("{e:#}"), "install it anew"),
    }];
    let own = args
        .containerd_config
        .clone()
        .or(running.and_then(|r| r.config))
        .unwrap_or_else(|| CONTAINERD_CONFIG.into());
    let major = words.ok().and_then(|w| containerd_version_of(&w));
    let looked = spawn_blocking(move || {
        // Every containerd starts without a file, but 1.7 dumps nothing without one.
        let there = Some(own.clone()).filter(|own| own.exists());
        let file = there.unwrap_or_else(|| "/dev/null".into());
        (file, ByHand::find(major.map(|(major, _)| major), own))
    });
    let (file, by_hand) = looked.await?;
    let dump = match dump(&program, &file).await {
        Ok(dump) => dump,
        Err(e) => {
            let advice = "correct containerd's configuration: `containerd config dump` must work";
            checks.push(Check::missing(
                "containerd's config",
                format!("{e:#}"),
                advice,
            ));
            return Ok((checks, None));
        }
    };
    let (check, handler) = handler(&dump, &args.handler, &by_hand);
    checks.push(check);
    let root = dump.get("root").and_then(toml::Value::as_str);
    let root = root.unwrap_or("/var/lib/containerd").to_owned();
    let of_files = (program, handler.clone());
    checks.extend(
        spawn_blocking(move || {
            let (program, handler) = of_files;
            let free = facts::space(Path::new(&root));
            let disk = disk("disk of images", &root, free, DISK);
            let shim = handler.map(|h| shim(h.program, &program));
            [Some(disk), shim].into_iter().flatten().collect::<Vec<_>>()
        })
        .await?,
    );
    Ok((checks, handler))
}

fn containerd_version(words: &str, runs: bool) -> Check {
    let name = words.split_whitespace().nth(2).unwrap_or_default();
    let numbers: Vec<u32> = name
        .trim_start_matches('v')
        .split(['.', '-', '+', '~'])
        .map_while(|n| n.parse().ok())
        .collect();
    let found = match runs {
        true => format!("{name}, running"),
        false => format!("{name}, not running"),
    };
    let vulnerable = match numbers[..] {
        [2, 0, ..] => true,
        [2, 1, patch, ..] => patch < 9,
        [2, 2, patch, ..] => patch < 5,
        [2, 3, patch, ..] => patch < 2,
        _ => false,
    };
    match numbers[..] {
        [major, minor, ..] if (major, minor) < (1, 7) => {
            Check::missing("containerd", found, "use containerd 1.7 or newer")
        }
        [_, _, ..] if vulnerable => Check::warning(
            "containerd",
            found,
            "update to 2.1.9, 2.2.5, 2.3.2 or newer: CVE-2026-53488 and CVE-2026-53492",
        ),
        [_, _, ..] if !runs => Check::warning("containerd", found, "start it"),
        [_, _, ..] => Check::ok("containerd", found),
        _ => Check::missing("containerd", words.trim(), "use containerd 1.7 or newer"),
    }
}

async fn dump(program: &Path, config: &Path) -> Result<toml::Table> {
    let args: [&OsStr; 4] = [
        "--config".as_ref(),
        config.as_ref(),
        "config".as_ref(),
        "dump".as_ref(),
    ];
    let text = facts::ask(program, &args).await?;
    toml::from_str(&text).context("read what `containerd config dump` says")
}

/// Where a user adds a handler to containerd's configuration by hand.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ByHand {
    /// In this file, containerd's own: a file beside it would take settings away, or stop
    /// containerd.
    Append(PathBuf),
    /// In a file that this one, containerd's own, imports.
    DropIn(PathBuf),
}

impl ByHand {
    /// For a containerd of a major version, 2 if that is not known, whose own file is `own`. Blocks.
    fn find(major: Option<u32>, own: PathBuf) -> Self {
        let text = fs::read_to_string(&own).unwrap_or_default();
        let file = toml::from_str::<toml::Table>(&text).unwrap_or_default();
        let is_version_2 = file.get("version").and_then(toml::Value::as_integer) == Some(2);
        match is_version_2 || major.is_some_and(|major| major < 2) {
            true => Self::Append(own),
            false => Self::DropIn(own),
        }
    }

    fn advice(&self) -> String {
        let by_hand = match self {
            Self::Append(own) => format!(
                "append deploy/containerd-1.7.toml to {}, which must say `version = 2`,",
                own.display()
            ),
            Self::DropIn(own) => format!(
                "put deploy/containerd.toml where `imports` of {} finds it,",
                own.display()
            ),
        };
        format!("kilnctl node enable, or {by_hand} and restart containerd")
    }
}

/// What containerd's whole configuration says of the handler `name`.
fn handler(dump: &toml::Table, name: &str, by_hand: &ByHand) -> (Check, Option<Handler>) {
    const CHECK: &str = "containerd's handler";
    let disabled = dump.get("disabled_plugins").and_then(toml::Value::as_array);
    let off = |plugin: &toml::Value| {
        let plugin = plugin.as_str().unwrap_or_default();
        plugin == "cri" || CRI.contains(&plugin)
    };
    if disabled.is_some_and(|d| d.iter().any(off)) {
        let advice = "take cri out of disabled_plugins in containerd's configuration";
        return (Check::missing(CHECK, "CRI is off", advice), None);
    }
    let plugins = dump.get("plugins").and_then(toml::Value::as_table);
    let found = CRI.iter().find_map(|cri| {
        let cri = plugins?.get(*cri)?;
        cri.get("containerd")?.get("runtimes")?.get(name)
    });
    let Some(found) = found else {
        let check = Check::missing(CHECK, format!("no handler {name}"), &by_hand.advice());
        return (check, None);
    };
    let text = |value: Option<&toml::Value>| {
        let text = value.and_then(toml::Value::as_str).unwrap_or_default();
        (!text.is_empty()).then(|| text.to_owned())
    };
    let handler = Handler {
        runtime_type: text(found.get("runtime_type")).unwrap_or_default(),
        program: text(found.get("runtime_path")).map(PathBuf::from),
        config: text(found.get("options").and_then(|o| o.get("ConfigPath"))).map(PathBuf::from),
    };
    let what = format!("{name} by {}", handler.runtime_type);
    if handler.runtime_type != RUNTIME_TYPE && handler.program.is_none() {
        let advice = format!("set runtime_type = \"{RUNTIME_TYPE}\" and restart containerd");
        return (Check::missing(CHECK, what, &advice), None);
    }
    (Check::ok(CHECK, what), Some(handler))
}

/// The shim's program: where the handler says, else where containerd looks. Blocks.
fn shim(named: Option<PathBuf>, containerd: &Path) -> Check {
    let beside = containerd.parent().unwrap_or(Path::new("/"));
    let found = match named {
        Some(path) => Some(path).filter(|p| facts::is_executable(p)),
        None => facts::find_program(SHIM, &[beside]),
    };
    match found {
        Some(path) => program("shim", &path, facts::is_noexec(&path)),
        None => Check::missing(
            "shim",
            "not there",
            "install containerd-shim-kiln-v2 in containerd's PATH, or name it by runtime_path",
        ),
    }
}

/// The runtime and its configuration.
async fn runtime(args: &Preflight, named: Option<PathBuf>) -> Result<Vec<Check>> {
    let given = args.runtime_config.clone().or(named);
    let read = spawn_blocking(move || read_runtime_config(given.as_deref())).await?;
    let (found, config) = match read {
        Ok(read) => read,
        Err(check) => return Ok(vec![check]),
    };
    let mut checks = vec![Check::ok("runtime's config", found)];
    let binary = config.binary.clone();
    let place = spawn_blocking(move || program("runtime", &binary, facts::is_noexec(&binary)));
    checks.push(match place.await? {
        check if check.verdict != Verdict::Ok => check,
        _ => match facts::ask(&config.binary, &["--version"]).await {
            Ok(words) => runsc_version(&words, &config.binary),
            Err(e) => Check::missing(
                "runtime",
                format!("{e:#}"),
                "install runsc of 2024 or newer, or name it by binary_name in the configuration",
            ),
        },
    });
    if config.flags.get("platform").is_some_and(|p| p == "kvm") {
        let is_there = spawn_blocking(|| Path::new("/dev/kvm").exists()).await?;
        checks.push(match is_there {
            true => Check::ok("/dev/kvm", "there"),
            false => Check::missing("/dev/kvm", "not there", "set platform = \"systrap\""),
        });
    }
    Ok(checks)
}

/// Reads the configuration that shims use, and says where it is from. Blocks.
fn read_runtime_config(given: Option<&Path>) -> Result<(String, RuntimeConfig), Check> {
    match NodeConfig::load(given) {
        Ok(config) => {
            let from = config.file.map(|file| file.display().to_string());
            let from = from.unwrap_or_else(|| "none: defaults".to_owned());
            Ok((from, config.runtime))
        }
        Err(e) => Err(Check::missing(
            "runtime's config",
            e.to_string(),
            "install deploy/runsc.toml there, or correct it",
        )),
    }
}

fn runsc_version(words: &str, program: &Path) -> Check {
    let name = words.split_whitespace().nth(2).unwrap_or_default();
    let found = format!("{name}, {}", program.display());
    let date = name
        .strip_prefix("release-")
        .and_then(|n| n.get(..8)?.parse::<u32>().ok());
    match date {
        Some(date) if date >= RUNSC => Check::ok("runtime", found),
        Some(_) => Check::missing("runtime", found, "install runsc of 2024 or newer"),
        None => Check::warning(
            "runtime",
            found,
            "it is no release; those of 2024 or newer work",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn verdict(check: &Check, wanted: Verdict) {
        assert_eq!(check.verdict, wanted, "{check:?}");
        assert_eq!(check.advice.is_empty(), wanted == Verdict::Ok, "{check:?}");
    }

    #[test]
    fn a_typo_in_the_runtimes_configuration_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("runsc.toml");
        std::fs::write(&file, "[kiln]\nparallel_start = 4\n").unwrap();
        let check = read_runtime_config(Some(&file)).unwrap_err();
        verdict(&check, Verdict::Missing);
        assert!(check.found.contains("parallel_start"), "{check:?}");
    }

    #[test]
    fn old_kernels_and_programs_are_told_from_new_ones() {
        for (release, wanted) in [
            ("6.18.0-kvm", Verdict::Ok),
            ("5.6.0", Verdict::Ok),
            ("5.4.0-200-generic", Verdict::Missing),
            ("", Verdict::Missing),
        ] {
            verdict(&kernel(release), wanted);
        }
        for (words, wanted) in [
            (
                "containerd github.com/containerd/containerd/v2 v2.4.2 abc",
                Verdict::Ok,
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.1.8 abc",
                Verdict::Warning,
            ),
            ("containerd containerd.io 1.7.28 b98a3aa", Verdict::Ok),
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1",
                Verdict::Missing,
            ),
            ("what?", Verdict::Missing),
        ] {
            verdict(&containerd_version(words, true), wanted);
        }
        let containerd = "containerd containerd.io 2.4.2 b98a3aa";
        verdict(&containerd_version(containerd, false), Verdict::Warning);
        for (words, wanted) in [
            ("runsc version release-20260803.0\nspec: 1.2.0", Verdict::Ok),
            ("runsc version release-20231204.0", Verdict::Missing),
            ("runsc version 0.0~20221219.0", Verdict::Warning),
        ] {
            verdict(&runsc_version(words, Path::new("/bin/runsc")), wanted);
        }
    }

    #[test]
    fn what_a_machine_lacks_is_named() {
        verdict(&root(false), Verdict::Missing);
        verdict(&architecture("riscv64"), Verdict::Missing);
        let controllers = ["cpu", "memory", "pids"].map(str::to_owned);
        verdict(&cgroup(2, &controllers), Verdict::Ok);
        let lacks = cgroup(2, &controllers[..1]);
        assert_eq!(lacks.found, "version 2 without memory, pids");
        verdict(&proc(None), Verdict::Missing);
        verdict(&proc(Some("rw,hidepid=invisible")), Verdict::Warning);
        verdict(&proc(Some("rw,nosuid,hidepid=0")), Verdict::Ok);
        verdict(&user_namespaces(Some("0")), Verdict::Missing);
        verdict(&user_namespaces(Some("15000")), Verdict::Ok);
        verdict(&memory(Some(1 << 20)), Verdict::Warning);
        let space = |free| {
            Some(Space {
                free,
                total: 100 << 30,
            })
        };
        verdict(&disk("disk", "/x", space(50 << 30), DISK), Verdict::Ok);
        verdict(&disk("disk", "/x", space(10 << 30), DISK), Verdict::Warning);
        verdict(&disk("disk", "/x", space(10 << 20), DISK), Verdict::Missing);
    }

    #[test]
    fn programs_must_be_executable_where_they_lie_and_the_agents_state_need_not_be() {
        let runsc = Path::new("/data/bin/runsc");
        for is_noexec in [Some(false), None] {
            let check = program("runtime", runsc, is_noexec);
            verdict(&check, Verdict::Ok);
            assert_eq!(check.found, "/data/bin/runsc");
        }
        let check = program("runtime", runsc, Some(true));
        verdict(&check, Verdict::Missing);
        assert!(check.found.starts_with("/data/bin/runsc"), "{check:?}");
        assert!(check.found.contains("noexec"), "{check:?}");
        verdict(&agent_state(Some(false)), Verdict::Ok);
        verdict(&agent_state(None), Verdict::Missing);
        let check = agent_state(Some(true));
        verdict(&check, Verdict::Ok);
        assert!(check.found.contains("noexec"), "{check:?}");
        assert!(check.found.contains("tmpfs"), "{check:?}");
    }

    #[test]
    fn a_handler_is_found_in_the_configuration_of_either_containerd() {
        let dump = |cri: &str, runtime: &str| -> toml::Table {
            let text = format!(
                "[plugins.'{cri}'.containerd.runtimes.gvisor]\nruntime_type = '{runtime}'\n\
                 [plugins.'{cri}'.containerd.runtimes.gvisor.options]\nConfigPath = '/c.toml'\n"
            );
            toml::from_str(&text).unwrap()
        };
        let handler = |dump: &toml::Table, name: &str| {
            handler(dump, name, &ByHand::DropIn(CONTAINERD_CONFIG.into()))
        };
        for cri in CRI {
            let (check, found) = handler(&dump(cri, RUNTIME_TYPE), "gvisor");
            verdict(&check, Verdict::Ok);
            assert_eq!(found.unwrap().config, Some("/c.toml".into()));
            verdict(
                &handler(&dump(cri, RUNTIME_TYPE), "kata").0,
                Verdict::Missing,
            );
            verdict(
                &handler(&dump(cri, "io.containerd.runsc.v1"), "gvisor").0,
                Verdict::Missing,
            );
        }
        let off = toml::from_str("disabled_plugins = ['cri']").unwrap();
        assert_eq!(handler(&off, "gvisor").0.found, "CRI is off");
    }

    #[test]
    fn a_handler_goes_where_this_containerd_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("config.toml");
        let advice = |major: Option<u32>| {
            let place = ByHand::find(major, own.clone());
            let (check, _) = handler(&toml::Table::new(), "gvisor", &place);
            verdict(&check, Verdict::Missing);
            check.advice
        };
        let append = format!("append deploy/containerd-1.7.toml to {}", own.display());
        let drop_in = format!(
            "put deploy/containerd.toml where `imports` of {} finds it",
            own.display()
        );
        // Without a file, and with one of each version.
        for (text, of_2) in [
            (None, &drop_in),
            (Some("oom_score = 0\n"), &drop_in),
            (Some("version = 2\n"), &append),
            (Some("version = 3\n"), &drop_in),
        ] {
            if let Some(text) = text {
                fs::write(&own, text).unwrap();
            }
            assert!(advice(Some(1)).contains(&append), "{text:?}");
            assert!(advice(Some(2)).contains(of_2), "{text:?}");
            assert!(advice(None).contains(of_2), "{text:?}");
        }
    }
}
