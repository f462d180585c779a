// SPDX-License-Identifier: Apache-2.0

//! QEMU's guest agent: commands in the machine, over a port that needs neither its network nor a
//! password of it. Its messages are lines of JSON (`qga/qapi-schema.json` of QEMU).

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD as STANDARD};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::Mutex,
    time::timeout,
};

/// How long the agent may take for an answer of its own.
const ANSWER: Duration = Duration::from_secs(60);

/// The same while it is not known whether there is one.
const HELLO: Duration = Duration::from_secs(5);

/// Pauses between two looks at whether a command has ended: the first, and the longest.
const LOOKS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Begins an answer whatever came before it.
const DELIMITER: u8 = 0xff;

/// What a command in the machine left.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: i64,
    pub(crate) out: String,
    pub(crate) errors: String,
}

/// The agent of one machine.
pub(crate) struct Guest {
    socket: PathBuf,
    stream: Mutex<Option<BufReader<UnixStream>>>,
}

impl Guest {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            stream: Mutex::default(),
        }
    }

    /// Whether the agent answers now.
    pub(crate) async fn is_there(&self) -> bool {
        let mut slot = self.stream.lock().await;
        *slot = timeout(HELLO, self.connect())
            .await
            .ok()
            .and_then(Result::ok);
        slot.is_some()
    }

    /// A connection on which the agent has answered.
    async fn connect(&self) -> Result<BufReader<UnixStream>> {
        let mut stream = BufReader::new(UnixStream::connect(&self.socket).await?);
        let id = rand_id();
        let hello = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        let mut line = vec![DELIMITER];
        line.extend(hello.to_string().into_bytes());
        line.push(b'\n');
        stream.write_all(&line).await?;
        loop {
            let (mut before, mut answer) = (Vec::new(), String::new());
            stream.read_until(DELIMITER, &mut before).await?;
            ensure!(before.last() == Some(&DELIMITER), "the port is closed");
            stream.read_line(&mut answer).await?;
            let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
            if answer["return"] == id {
                return Ok(stream);
            }
        }
    }

    async fn call(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut slot = self.stream.lock().await;
        let mut stream = match slot.take() {
            Some(stream) => stream,
            None => timeout(ANSWER, self.connect()).await??,
        };
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        let answer = timeout(ANSWER, async {
            stream.write_all(line.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_line(&mut answer).await?;
            anyhow::Ok(answer)
        });
        // One that is late would be taken for the next one's: the stream goes with it.
        let answer = answer
            .await
            .with_context(|| format!("{command}: no answer"))??;
        let answer: Value = serde_json::from_str(&answer).context(command.to_owned())?;
        *slot = Some(stream);
        match answer.get("return") {
            Some(result) => Ok(result.clone()),
            None => bail!("{command}: {answer}"),
        }
    }

    /// Runs a script of bash's, and returns what it left, however it ended.
    pub(crate) async fn run(&self, script: &str, limit: Duration) -> Result<Output> {
        let shell = json!({
            "path": "/bin/bash",
            "arg": ["-c", format!("export PATH=/mnt/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n{script}")],
            "capture-output": true,
        });
        let pid = self.call("guest-exec", shell).await?["pid"].clone();
        let (begun, (mut pause, longest)) = (Instant::now(), LOOKS);
        loop {
            let status = self.call("guest-exec-status", json!({"pid": pid})).await?;
            if status["exited"] == true {
                return Ok(Output {
                    code: status["exitcode"].as_i64().unwrap_or(-1),
                    out: text_of(&status["out-data"])?,
                    errors: text_of(&status["err-data"])?,
                });
            }
            ensure!(
                begun.elapsed() < limit,
                "not done after {limit:?}: {script}"
            );
            tokio::time::sleep(pause).await;
            pause = longest.min(pause * 2);
        }
    }
}

/// A number that an earlier connection has hardly used.
fn rand_id() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.subsec_nanos() / 2)
}

fn text_of(data: &Value) -> Result<String> {
    let bytes = STANDARD.decode(data.as_str().unwrap_or_default())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
