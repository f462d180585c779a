// SPDX-License-Identifier: Apache-2.0
//! `pgrep NAME`: the processes whose name contains NAME.

use std::fs;
use std::process;

use crate::{Failure, print};

/// Prints the pids; ends with 1 when there are none, as the real one does.
pub(crate) fn run(args: &[String]) -> Result<u8, Failure> {
    let [name] = args else {
        return Err(Failure::Usage("pgrep NAME"));
    };
    let mut pids = pids(name)?;
    pids.sort_unstable();
    print(
        &pids
            .iter()
            .map(|pid| format!("{pid}\n"))
            .collect::<String>(),
    )?;
    Ok(u8::from(pids.is_empty()))
}

fn pids(name: &str) -> Result<Vec<u32>, Failure> {
    let entries = fs::read_dir("/proc").map_err(Failure::io("read /proc"))?;
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // A process that ended meanwhile has no name any more and is left out.
    let named = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|comm| comm.trim_end().contains(name))
    };
    Ok(pids
        .filter(|pid| *pid != process::id())
        .filter(named)
        .collect())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_found_by_its_name_and_we_are_not() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let found = pids("sleep").unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&child.id()));
        assert!(!pids("").unwrap().contains(&process::id()));
    }
}
