// SPDX-License-Identifier: Apache-2.0
//! `lock`, `append`, `listen` and `ask`: what processes do to each other by files.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use crate::{Failure, print};

/// `lock FILE SECONDS`: says whether it got the lock, and holds it for that long.
pub(crate) fn lock(args: &[String]) -> Result<u8, Failure> {
    let usage = Failure::Usage("lock FILE SECONDS");
    let [path, seconds] = args else {
        return Err(usage);
    };
    let Ok(seconds) = seconds.parse() else {
        return Err(usage);
    };
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    let file = options
        .open(path)
        .map_err(Failure::io(format!("open {path}")))?;
    if file.try_lock().is_err() {
        print("refused\n")?;
        return Ok(1);
    }
    print("locked\n")?;
    thread::sleep(Duration::from_secs(seconds));
    Ok(0)
}

/// `append FILE LINES WORD`: each line is a write of its own.
pub(crate) fn append(args: &[String]) -> Result<u8, Failure> {
    let usage = Failure::Usage("append FILE LINES WORD");
    let [path, lines, word] = args else {
        return Err(usage);
    };
    let Ok(lines) = lines.parse::<u32>() else {
        return Err(usage);
    };
    let opened = OpenOptions::new().create(true).append(true).open(path);
    let mut file: File = opened.map_err(Failure::io(format!("open {path}")))?;
    for number in 0..lines {
        file.write_all(format!("{word} {number}\n").as_bytes())
            .map_err(Failure::io(format!("append to {path}")))?;
    }
    Ok(0)
}

/// `listen SOCKET WORD`: says the word to whoever connects.
pub(crate) fn listen(args: &[String]) -> Result<u8, Failure> {
    let [path, word] = args else {
        return Err(Failure::Usage("listen SOCKET WORD"));
    };
    let listener = UnixListener::bind(path).map_err(Failure::io(format!("listen at {path}")))?;
    loop {
        let (mut stream, _) = listener
            .accept()
            .map_err(Failure::io(format!("accept at {path}")))?;
        // Who has gone does not want to know.
        let _ = writeln!(stream, "{word}");
    }
}

/// `ask SOCKET`: prints what is said there.
pub(crate) fn ask(args: &[String]) -> Result<u8, Failure> {
    let [path] = args else {
        return Err(Failure::Usage("ask SOCKET"));
    };
    let connected = UnixStream::connect(path);
    let mut stream = connected.map_err(Failure::io(format!("connect to {path}")))?;
    let mut said = String::new();
    stream
        .read_to_string(&mut said)
        .map_err(Failure::io(format!("read from {path}")))?;
    print(&said)?;
    Ok(0)
}
