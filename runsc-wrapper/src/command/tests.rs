// SPDX-License-Identifier: Apache-2.0

//! Commands that answer, hang, leak and talk too much.

use std::{io::Read, time::Instant};

use nix::fcntl::{FcntlArg, FdFlag};

use super::*;

fn sh(script: &str) -> Command {
    Command::new(Path::new("/bin/sh"))
        .args(["-c", script])
        .deadline(Duration::from_secs(60))
}

#[tokio::test]
async fn output_and_status_are_returned() {
    let output = sh("cat; echo err >&2; exit 3")
        .input(b"in".to_vec())
        .run()
        .await
        .unwrap();
    assert_eq!(output.stdout, b"in");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.exit().code, 3);
    assert_eq!(output.message(), "err");
}

#[tokio::test]
async fn the_environment_is_made_from_nothing() {
    let output = Command::new(Path::new("/usr/bin/env"))
        .env("A", "b")
        .run()
        .await
        .unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("A=b\nPATH={PATH}\n")
    );
}

#[tokio::test]
async fn only_the_log_is_inherited() {
    // A descriptor without close-on-exec, as a careless library would leave it.
    let leak = std::fs::File::open("/etc/passwd").unwrap();
    nix::fcntl::fcntl(&leak, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let log = Log::new().unwrap();
    let path = log.path();
    let script = format!(
        "ls -l /proc/self/fd >&2; echo '{{\"level\":\"error\",\"msg\":\"no\"}}' >>{path}; exit 1"
    );
    let output = sh(&script).log(log).run().await.unwrap();
    let listed = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!listed.contains("/etc/passwd"), "{listed}");
    assert!(listed.contains("runtime-log"), "{listed}");
    assert_eq!(output.message(), "no");
}

#[tokio::test]
async fn the_deadline_kills_what_left_the_group_too() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let started = Instant::now();
    let stdio = Stdio {
        stdout: Some(writer.into()),
        ..Stdio::default()
    };
    let error = sh("setsid sleep 100 & sleep 100")
        .stdio(stdio)
        .deadline(Duration::from_millis(300))
        .kill_tree()
        .run()
        .await
        .unwrap_err();
    assert!(matches!(error, CommandError::Timeout { .. }), "{error}");
    // Both held the pipe: its end shows that both are dead.
    tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new()))
        .await
        .unwrap()
        .unwrap();
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_stop_it() {
    let dir = tempfile::tempdir().unwrap();
    let done = dir.path().join("done");
    let command = sh(&format!("sleep 0.3; touch {}", done.display()));
    let _ = tokio::time::timeout(Duration::from_millis(50), command.run()).await;
    for _ in 0..1200 {
        if done.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the command was stopped");
}

#[tokio::test]
async fn output_beyond_the_limit_is_dropped_and_does_not_block() {
    let output = sh("head -c 20000000 /dev/zero").run().await.unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout.len(), OUTPUT_LIMIT);
}

#[tokio::test]
async fn a_running_command_can_be_killed() {
    let mut running = sh("sleep 100").start().unwrap();
    running.kill();
    assert_eq!(running.output().await.unwrap().exit().code, 137);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let error = Command::new(Path::new("/no/such/runsc"))
        .run()
        .await
        .unwrap_err();
    assert!(
        error.to_string().starts_with("run /no/such/runsc: "),
        "{error}"
    );
}
