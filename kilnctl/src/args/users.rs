// SPDX-License-Identifier: Apache-2.0

//! The command line of what users do with sandboxes.

use std::time::Duration;

use clap::{Args as Flags, ValueEnum};

use super::duration;

/// A namespace.
#[derive(Debug, Clone, Flags)]
pub(crate) struct Place {
    /// Namespace [default: that of the context, else default].
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Flags)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) source: Source,

    /// Name of the new claim or sandbox [default: generated].
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// RuntimeClass of a sandbox of IMAGE.
    #[arg(long, default_value = "gvisor", value_name = "CLASS")]
    pub(crate) runtime_class: String,

    /// Delete the claim or sandbox when the command has ended.
    #[arg(long)]
    pub(crate) rm: bool,

    /// Time limit until the sandbox is ready.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,

    #[command(flatten)]
    pub(crate) place: Place,

    #[command(flatten)]
    pub(crate) process: Process,
}

/// Where a new sandbox comes from.
#[derive(Debug, Clone, Flags)]
#[group(required = true, multiple = false)]
pub(crate) struct Source {
    /// Image of a new sandbox. It must contain the program `sleep`, which runs beside the command.
    pub(crate) image: Option<String>,

    /// Claim a sandbox of this SandboxTemplate, warm if a pool has one.
    #[arg(long)]
    pub(crate) template: Option<String>,

    /// Claim a sandbox of this SandboxWarmPool.
    #[arg(long)]
    pub(crate) pool: Option<String>,
}

/// A command that runs in a sandbox.
#[derive(Debug, Clone, Flags)]
pub(crate) struct Process {
    /// Pass standard input to the command.
    #[arg(short = 'i', long)]
    pub(crate) stdin: bool,

    /// Run the command on a terminal.
    #[arg(short = 't', long)]
    pub(crate) tty: bool,

    /// Container [default: the one that the template names, else the first].
    #[arg(short, long)]
    pub(crate) container: Option<String>,

    /// Command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Flags)]
pub(crate) struct Exec {
    /// Claim or sandbox.
    pub(crate) name: String,

    #[command(flatten)]
    pub(crate) place: Place,

    #[command(flatten)]
    pub(crate) process: Process,
}

#[derive(Debug, Flags)]
pub(crate) struct Logs {
    /// Claim or sandbox.
    pub(crate) name: String,

    /// Print new lines as they come.
    #[arg(short, long)]
    pub(crate) follow: bool,

    /// Print only this many of the last lines [default: all].
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<i64>,

    /// Print the log of the container before its last restart.
    #[arg(short, long)]
    pub(crate) previous: bool,

    /// Container [default: the one that the template names, else the first].
    #[arg(short, long)]
    pub(crate) container: Option<String>,

    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Flags)]
pub(crate) struct List {
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub(crate) output: ListFormat,

    #[command(flatten)]
    pub(crate) place: Place,
}

/// How sandboxes are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    Table,
    /// The table with addresses, and why a sandbox is not ready.
    Wide,
    Json,
}

#[derive(Debug, Flags)]
pub(crate) struct Mode {
    /// Claim or sandbox.
    pub(crate) name: String,

    /// Time limit.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,

    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Flags)]
pub(crate) struct Remove {
    /// Claims or sandboxes.
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,

    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Flags)]
pub(crate) struct Copy {
    /// File or directory: a path, or NAME:PATH in a claim or sandbox.
    #[arg(value_name = "FROM")]
    pub(crate) from: String,

    /// Its new path, likewise. A path that ends in a slash is a directory to put it into.
    #[arg(value_name = "TO")]
    pub(crate) to: String,

    /// Container [default: the one that the template names, else the first].
    #[arg(short, long)]
    pub(crate) container: Option<String>,

    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Flags)]
pub(crate) struct PortForward {
    /// Claim or sandbox.
    pub(crate) name: String,

    /// Ports as LOCAL:REMOTE or PORT for both; LOCAL 0 takes a free port.
    #[arg(required = true, value_name = "[LOCAL:]REMOTE", value_parser = ports)]
    pub(crate) ports: Vec<(u16, u16)>,

    #[command(flatten)]
    pub(crate) place: Place,
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| text.parse::<u16>().map_err(|e| format!("{text:?}: {e}"));
    let (local, remote) = match text.split_once(':') {
        Some((local, remote)) => (port(local)?, port(remote)?),
        None => (port(text)?, port(text)?),
    };
    match remote {
        0 => Err("port 0 is no port of a sandbox".to_owned()),
        _ => Ok((local, remote)),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Args, Command};

    fn run(words: &[&str]) -> Result<Run, clap::Error> {
        match Args::try_parse_from([&["kilnctl", "run"], words].concat())?.command {
            Command::Run(run) => Ok(run),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_sandbox_comes_from_one_place() {
        let image = run(&["busybox:1", "-it", "--rm", "--", "sh", "-c", "exit 3"]).unwrap();
        assert_eq!(image.source.image.as_deref(), Some("busybox:1"));
        assert!(image.process.stdin && image.process.tty && image.rm);
        assert_eq!(image.process.command, ["sh", "-c", "exit 3"]);
        let pool = run(&["--pool", "p", "-n", "team", "--", "id"]).unwrap();
        assert_eq!(pool.place.namespace.as_deref(), Some("team"));
        for wrong in [
            &["--", "id"][..],
            &["--pool", "p", "--template", "t", "--", "id"],
            &["image", "--pool", "p", "--", "id"],
            &["image"],
        ] {
            assert!(run(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn ports_are_pairs() {
        assert_eq!(ports("8080:80"), Ok((8080, 80)));
        assert_eq!(ports("80"), Ok((80, 80)));
        assert_eq!(ports("0:80"), Ok((0, 80)));
        for wrong in ["", "80:", "80:0", "x:1", "1:70000"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }
}
