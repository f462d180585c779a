// SPDX-License-Identifier: Apache-2.0

//! The command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args as Flags, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

/// Puts Agent Sandbox on a cluster, says what is there, and takes it away again.
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
    /// File that says where the cluster is and who you are; $KUBECONFIG, else ~/.kube/config.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,

    /// Which of its contexts; the current one when unset.
    #[arg(long, global = true)]
    pub(crate) context: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Put Agent Sandbox on the cluster, or bring it to the state of this program.
    Enable(Enable),

    /// Say what of it is there and works.
    ///
    /// Ends with 0 where Agent Sandbox is enabled, and with 1 where it is not or cannot be seen.
    Status {
        /// As a table, as JSON, or as the one word True or False.
        #[arg(short, long = "output", visible_alias = "format", value_enum, default_value_t = Format::Table)]
        output: Format,
    },

    /// Take away what enable has put there.
    ///
    /// Definitions, the namespace, and all objects of users stay, and Pods keep running. Ends with
    /// 1 where nodes keep something of what was installed on them, and names them.
    Disable(Disable),

    /// Look at this node, without a cluster.
    #[command(subcommand)]
    Node(NodeCommand),

    /// Print the version of this program, and so of what it enables.
    Version,

    /// Print what makes a shell complete the words of this program.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Flags)]
pub(crate) struct Enable {
    #[command(flatten)]
    pub(crate) images: Images,

    /// Run agents on nodes with this label only, such as sandbox.gke.io/runtime=gvisor.
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) node_selector: Vec<(String, String)>,

    /// What is different on this cluster: a file with objects of ours, each with its kind and
    /// name and what is to be merged into it (RFC 7396). May be given more than once.
    #[arg(long, value_name = "FILE")]
    pub(crate) patch: Vec<PathBuf>,

    /// Take over definitions and objects of the same names that are somebody else's.
    #[arg(long)]
    pub(crate) take_over: bool,

    #[command(flatten)]
    pub(crate) waiting: Waiting,
}

/// Where images come from.
#[derive(Debug, Clone, Default, Flags)]
pub(crate) struct Images {
    /// Registry and path of the images, such as registry.example/kiln; without it they must be on
    /// the nodes already.
    #[arg(long, value_name = "REGISTRY")]
    pub(crate) image_registry: Option<String>,

    /// Their tag.
    #[arg(long, value_name = "TAG")]
    pub(crate) image_tag: Option<String>,
}

#[derive(Debug, Flags)]
pub(crate) struct Disable {
    /// Take away everything: claims, pools, sandboxes with their Pods, templates, the definitions
    /// and the namespace.
    #[arg(long)]
    pub(crate) purge: bool,

    /// How long that may take.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
}

/// Whether to wait, and how long.
#[derive(Debug, Clone, Copy, Flags)]
pub(crate) struct Waiting {
    /// Whether to wait until controller and agents are ready.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) wait: bool,

    /// How long to wait.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Print what this node's agent holds.
    Status {
        /// Where the agent listens.
        #[arg(long, default_value = kiln_agent_api::SOCKET)]
        socket: PathBuf,

        /// As a table or as JSON.
        #[arg(short, long, value_enum, default_value_t = NodeFormat::Table)]
        output: NodeFormat,
    },

    /// Say what this node lacks. Ends with 1 where something is missing.
    Preflight(Preflight),

    /// Put shim, runtime and handler on this node, and run a sandbox for trial.
    ///
    /// In a cluster the nodes' agents do this. Where it does not work, the node is left as it was.
    Enable(NodeEnable),

    /// Take away what enable or an agent has put on this node.
    Disable(NodeDisable),
}

#[derive(Debug, Flags)]
pub(crate) struct NodeEnable {
    /// Directory with containerd-shim-kiln-v2, kiln-pause and, unless the node has one, runsc; the
    /// one of this program.
    #[arg(long, value_name = "DIR")]
    pub(crate) from: Option<PathBuf>,

    /// The node's own runsc, to be used instead of one from that directory.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) runsc: Option<PathBuf>,

    /// An agent's configuration, whose table `[install]` says where everything goes.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Flags)]
pub(crate) struct NodeDisable {
    /// The configuration that it was enabled with.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Flags)]
pub(crate) struct Preflight {
    /// The containerd to look at; the one that runs, else the one in PATH.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) containerd: Option<PathBuf>,

    /// Its configuration; the one that it runs with, else its default.
    #[arg(long, value_name = "FILE")]
    pub(crate) containerd_config: Option<PathBuf>,

    /// The runtime's configuration; the one that containerd's handler names.
    #[arg(long, value_name = "FILE")]
    pub(crate) runtime_config: Option<PathBuf>,

    /// The handler that Pods come by.
    #[arg(long, default_value = "gvisor")]
    pub(crate) handler: String,

    /// As a table or as JSON.
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
fn duration(text: &str) -> Result<Duration, String> {
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
