// SPDX-License-Identifier: Apache-2.0
//! The programs that run inside the test images, in one static binary that is called by many
//! names, as busybox is: the name (or else the first argument) picks the applet.
//!
//! | applet | what it does |
//! |---|---|
//! | `pause` | reaps children, ends with 0 on TERM or INT |
//! | `nginx [PORT]`, `httpd [PORT]` | answers every HTTP request with one page, port 80 by default |
//! | `nnp` | prints its effective uid; its file is setuid root in its image |
//! | `spam BYTES` | writes that many bytes of numbered 105-byte lines to stdout |
//! | `exit N` | ends with that code |
//! | `burn SECONDS` | uses one CPU for that long |
//! | `eat BYTES` | holds that much touched memory until TERM |
//! | `trap` | prints the name of each signal it gets, ends with 3 on TERM |
//! | `lock FILE SECONDS` | tries to lock the file, prints `locked` or `refused`, holds it for that long |
//! | `append FILE LINES WORD` | appends so many lines that begin with the word, each by a write of its own |
//! | `listen SOCKET WORD`, `ask SOCKET` | says the word at a UNIX socket to whoever connects; prints what is said |
//! | `pgrep NAME`, `ipcs [-m]` | the two programs that tests call and Debian's busybox lacks |
//!
//! It must be built static, because most of its images hold no C library; `kiln-images
//! build-guest` runs the right command. A plain build works on the host only.

#![cfg_attr(not(test), no_main)]

mod ipcs;
mod load;
mod pause;
mod pgrep;
mod share;
mod signals;
mod trap;
mod web;

use std::env;
use std::ffi::c_int;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

/// Exit code for a wrong command line (`EX_USAGE` of sysexits.h).
const USAGE: c_int = 64;

/// Why an applet did not do its job.
#[derive(Debug)]
enum Failure {
    /// The arguments make no sense; holds the usage line.
    Usage(&'static str),
    /// The system refused something.
    Io {
        /// What was tried, as a verb and a noun.
        action: String,
        /// The refusal.
        source: io::Error,
    },
}

impl Failure {
    /// For `map_err`: names what was tried.
    fn io<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Failure::Io {
            action,
            source: source.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(line) => write!(f, "usage: {line}"),
            Failure::Io { action, source } => write!(f, "cannot {action}: {source}"),
        }
    }
}

/// What an applet is: its arguments in, its exit code out.
type Applet = fn(&[String]) -> Result<u8, Failure>;

/// Every applet by name, in the order of the table above.
const APPLETS: [(&str, Applet); 15] = [
    ("pause", pause::run),
    ("nginx", web::nginx),
    ("httpd", web::httpd),
    ("nnp", nnp),
    ("spam", load::spam),
    ("exit", exit),
    ("burn", load::burn),
    ("eat", load::eat),
    ("trap", trap::run),
    ("lock", share::lock),
    ("append", share::append),
    ("listen", share::listen),
    ("ask", share::ask),
    ("pgrep", pgrep::run),
    ("ipcs", ipcs::run),
];

/// The C library calls this in place of the start-up code of `std`, whose stack overflow handler
/// is 140 kB of a static binary; `std::env` has the arguments all the same.
// SAFETY: no other symbol of this program has the name, and it is what the C library expects.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> c_int {
    let argv: Vec<String> = env::args_os()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let (name, applet, args) = match find(&argv) {
        Some(found) => found,
        None if argv.get(1).is_some_and(|a| a == "--list") => ("--list", list as Applet, &[][..]),
        None => ("kiln-guest", usage as Applet, &[][..]),
    };
    match applet(args) {
        Ok(code) => code.into(),
        Err(failure) => {
            // Nobody is left to tell when stderr is closed too.
            let _ = writeln!(io::stderr(), "{name}: {failure}");
            if matches!(failure, Failure::Usage(_)) {
                USAGE
            } else {
                1
            }
        }
    }
}

/// Finds the applet that `argv` means, and its arguments.
fn find(argv: &[String]) -> Option<(&'static str, Applet, &[String])> {
    let by_name = |name: &str| APPLETS.iter().find(|(n, _)| *n == name);
    let (own, rest) = argv.split_first()?;
    if own.starts_with(web::NGINX_TITLE) {
        return Some(("nginx", web::nginx, rest));
    }
    if let Some((name, applet)) = by_name(Path::new(own).file_name()?.to_str()?) {
        return Some((name, *applet, rest));
    }
    let (first, rest) = rest.split_first()?;
    by_name(first).map(|(name, applet)| (*name, *applet, rest))
}

/// `--list`: the applets' names, one a line, as busybox prints them.
fn list(_: &[String]) -> Result<u8, Failure> {
    let names: String = APPLETS.iter().flat_map(|(name, _)| [name, "\n"]).collect();
    print(&names)?;
    Ok(0)
}

fn usage(_: &[String]) -> Result<u8, Failure> {
    Err(Failure::Usage("kiln-guest --list | APPLET [ARG…]"))
}

/// `nnp`: what critest's NoNewPrivs specs look for in the log.
fn nnp(_: &[String]) -> Result<u8, Failure> {
    print(&format!("Effective uid: {}\n", nix::unistd::geteuid()))?;
    Ok(0)
}

/// `exit N`.
fn exit(args: &[String]) -> Result<u8, Failure> {
    args.first()
        .and_then(|n| n.parse().ok())
        .ok_or(Failure::Usage("exit CODE (0 to 255)"))
}

/// Writes `text` to stdout and flushes it.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Failure::io("write to stdout"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(argv: &[&str]) -> Option<(&'static str, Vec<String>)> {
        let argv: Vec<String> = argv.iter().map(|a| (*a).to_owned()).collect();
        find(&argv).map(|(name, _, args)| (name, args.to_vec()))
    }

    #[test]
    fn the_own_name_picks_the_applet() {
        assert_eq!(
            found(&["/usr/sbin/httpd", "8080"]),
            Some(("httpd", vec!["8080".into()]))
        );
    }

    #[test]
    fn the_first_argument_picks_the_applet_under_any_other_name() {
        assert_eq!(
            found(&["/bin/kiln-guest", "exit", "3"]),
            Some(("exit", vec!["3".into()]))
        );
    }

    #[test]
    fn the_title_of_nginx_is_nginx() {
        assert_eq!(
            found(&[web::NGINX_TITLE, "81"]),
            Some(("nginx", vec!["81".into()]))
        );
    }

    #[test]
    fn an_unknown_name_is_no_applet() {
        assert_eq!(found(&["kiln-guest", "rm"]), None);
        assert_eq!(found(&["kiln-guest"]), None);
        assert_eq!(found(&[]), None);
        assert_eq!(found(&["/", "exit"]), None);
    }

    #[test]
    fn exit_takes_a_code_that_fits() {
        assert_eq!(exit(&["7".into()]).unwrap(), 7);
        assert!(matches!(exit(&["256".into()]), Err(Failure::Usage(_))));
        assert!(matches!(exit(&[]), Err(Failure::Usage(_))));
    }
}
