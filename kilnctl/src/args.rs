// SPDX-License-Identifier: Apache-2.0

//! The command line.

pub(crate) mod users;

use std::{path::PathBuf, time::Duration};

use clap::{Args as Flags, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

/// Run commands in sandboxes of a Kubernetes cluster; install, check and remove Agent Sandbox there.
#[derive(Debug, Parser)]
#[command(name = "kilnctl", version, propagate_version = true)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) connection: Connection,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which cluster.
#[derive(Debug, Clone, Default, Flags)]
pub(crate) struct Connection {
    /// Kubeconfig file [default: $KUBECONFIG, else ~/.kube/config].
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,

    /// Context of the kubeconfig [default: its current context].
    #[arg(long, global = true)]
    pub(crate) context: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new sandbox.
    ///
    /// Makes a claim of a template or pool, or a Sandbox of an image, waits until it is ready, runs
    /// the command, and exits with the command's exit code.
    Run(users::Run),

    /// Run a command in a sandbox.
    Exec(users::Exec),

    /// Print the log of a sandbox.
    Logs(users::Logs),

    /// List claims and sandboxes of a namespace.
    #[command(visible_alias = "ls")]
    List(users::List),

    /// Suspend a sandbox: its Pod ends, volumes stay.
    Suspend(users::Mode),

    /// Resume a suspended sandbox, and say whether its memory was kept.
    Resume(users::Mode),

    /// Delete claims or sandboxes, and wait until they are gone.
    Rm(users::Remove),

    /// Copy files and directories between this machine and a sandbox, which must contain `tar`.
    ///
    /// Links and devices are not copied from a sandbox.
    Cp(users::Copy),

    /// Forward ports of this machine to a sandbox.
    PortForward(users::PortForward),

    /// Install Agent Sandbox on the cluster, or upgrade it to this version.
    ///
    /// Changes nothing if something is in the way, and says what.
    Enable(Enable),

    /// Show the status of Agent Sandbox on the cluster.
    ///
    /// Exits with 0 if Agent Sandbox is enabled, and with 1 if it is not or cannot be seen.
    Status {
        /// Output format; `value` prints True or False.
        #[arg(short, long = "output", visible_alias = "format", value_enum, default_value_t = Format::Table)]
        output: Format,
    },

    /// Remove Agent Sandbox from the cluster.
    ///
    /// Definitions, the namespace and all objects of users stay, and Pods keep running. Exits with 1
    /// if something stays on nodes, and names them.
    Disable(Disable),

    /// Manage this node without a cluster.
    #[command(subcommand)]
    Node(NodeCommand),

    /// Print the version of this program, which is also the version that it installs.
    Version,

    /// Generate a shell completion script.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Flags)]
pub(crate) struct Enable {
    #[command(flatten)]
    pub(crate) images: Images,

    /// Run node agents only on nodes with this label, for example sandbox.gke.io/runtime=gvisor.
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) node_selector: Vec<(String, String)>,

    /// File with changes to the installed objects: partial objects with kind and name, merged by
    /// JSON merge patch (RFC 7396). May be repeated.
    #[arg(long, value_name = "FILE")]
    pub(crate) patch: Vec<PathBuf>,

    /// Take over definitions and objects of the same names that another installer owns.
    #[arg(long)]
    pub(crate) take_over: bool,

    #[command(flatten)]
    pub(crate) waiting: Waiting,
}

/// Where images come from.
#[derive(Debug, Clone, Default, Flags)]
pub(crate) struct Images {
    /// Registry and path of the images, for example registry.example/kiln. Without it, the images
    /// must already be on the nodes.
    #[arg(long, value_name = "REGISTRY")]
    pub(crate) image_registry: Option<String>,

    /// Tag of the images [default: dev].
    #[arg(long, value_name = "TAG")]
    pub(crate) image_tag: Option<String>,
}

#[derive(Debug, Flags)]
pub(crate) struct Disable {
    /// Delete everything: claims, pools, sandboxes with their Pods, templates, the definitions and
    /// the namespace. Asks first.
    #[arg(long)]
    pub(crate) purge: bool,

    /// Purge without asking.
    #[arg(short, long, requires = "purge")]
    pub(crate) yes: bool,

    /// Time limit.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
}

/// Whether to wait, and how long.
#[derive(Debug, Clone, Copy, Flags)]
pub(crate) struct Waiting {
    /// Wait until controller, router and agents are ready.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) wait: bool,

    /// Time limit of the wait.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Show what this node's agent holds.
    Status {
        /// The agent's socket.
        #[arg(long, default_value = kiln_agent_api::SOCKET)]
        socket: PathBuf,

        /// Output format.
        #[arg(short, long, value_enum, default_value_t = NodeFormat::Table)]
        output: NodeFormat,
    },

    /// Check what this node lacks. Exits with 1 if something is missing.
    Preflight(Preflight),

    /// Install shim, runtime and containerd's handler on this node, and run a sandbox for trial.
    ///
    /// In a cluster, the node agents do this. If a step fails, the node is left as it was.
    Enable(NodeEnable),

    /// Remove what enable or an agent has installed on this node.
    Disable(NodeDisable),
}

#[derive(Debug, Flags)]
pub(crate) struct NodeEnable {
    /// Directory with containerd-shim-kiln-v2, kiln-pause and, unless the node has one, runsc
    /// [default: the directory of this program].
    #[arg(long, value_name = "DIR")]
    pub(crate) from: Option<PathBuf>,

    /// The node's own runsc, used instead of the one in that directory.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) runsc: Option<PathBuf>,

    /// Configuration of an agent; its `[install]` table says where everything goes.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Flags)]
pub(crate) struct NodeDisable {
    /// Configuration with which it was enabled.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Flags)]
pub(crate) struct Preflight {
    /// The containerd to check [default: the running one, else the one in PATH].
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) containerd: Option<PathBuf>,

    /// Configuration of containerd [default: that of the running one, else containerd's default].
    #[arg(long, value_name = "FILE")]
    pub(crate) containerd_config: Option<PathBuf>,

    /// Configuration of the runtime [default: the file that containerd's handler names].
    #[arg(long, value_name = "FILE")]
    pub(crate) runtime_config: Option<PathBuf>,

    /// containerd's handler of the Pods.
    #[arg(long, default_value = "gvisor")]
    pub(crate) handler: String,

    /// Output format.
    #[arg(short, long, value_enum, default_value_t = NodeFormat::Table)]
    pub(crate) output: NodeFormat,
}

/// How a cluster's state is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    /// True or False.
    Value,
}

/// How a node's state is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NodeFormat {
    Table,
    Json,
}

impl Args {
    /// The arguments of this process. Ends it after `--help` and for values that make no sense.
    pub(crate) fn of_process() -> Self {
        let matches = command().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|e| e.exit())
    }
}

/// The command under the name that it was called by: kubectl runs `kubectl-kiln` for
/// `kubectl kiln`.
fn command() -> clap::Command {
    let called = std::env::args_os().next().unwrap_or_default();
    let name = PathBuf::from(called);
    match name.file_name().and_then(|n| n.to_str()) {
        Some("kubectl-kiln") => Args::command().bin_name("kubectl kiln"),
        _ => Args::command(),
    }
}

/// The script that makes `shell` complete.
pub(crate) fn completion(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "kilnctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// A duration as Kubernetes' tools write it: `1m30s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration = text.parse().map_err(|e| format!("{e}"))?;
    Duration::try_from(parsed).map_err(|e| format!("{e}"))
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it is not KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_make_sense() {
        Args::command().debug_assert();
        let args = Args::parse_from(["kilnctl", "status", "--format", "value"]);
        assert!(matches!(
            args.command,
            Command::Status {
                output: Format::Value
            }
        ));
        let words = [
            "kilnctl",
            "enable",
            "--wait=false",
            "--timeout",
            "90s",
            "--node-selector",
            "a/b=c",
        ];
        let Command::Enable(enable) = Args::parse_from(words).command else {
            panic!("not enable");
        };
        assert!(!enable.waiting.wait);
        assert_eq!(enable.waiting.timeout, Duration::from_secs(90));
        assert_eq!(enable.node_selector, [("a/b".to_owned(), "c".to_owned())]);
        assert!(completion(clap_complete::Shell::Bash).contains("preflight"));
    }
}
