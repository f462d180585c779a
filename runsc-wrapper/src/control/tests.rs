// SPDX-License-Identifier: Apache-2.0

//! The client against servers that do what a sandbox in bad hands could do.

use std::{
    io::{IoSlice, Read, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    thread::JoinHandle,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use super::*;

/// More than an answer takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Server {
    _dir: tempfile::TempDir,
    client: Client,
    thread: JoinHandle<()>,
}

impl Server {
    /// The client with less time than the server takes.
    fn hasty(&self) -> Client {
        Client {
            deadline: Duration::from_secs(2),
            ..self.client.clone()
        }
    }
}

/// A server that reads one request, hands it to `answer`, and is done.
fn server(answer: impl FnOnce(String, UnixStream) + Send + 'static) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let client = Client::new(&path, std::process::id(), PATIENCE);
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = vec![0; 1 << 20];
        let read = stream.read(&mut request).unwrap();
        request.truncate(read);
        answer(String::from_utf8(request).unwrap(), stream);
    });
    Server {
        _dir: dir,
        client,
        thread,
    }
}

/// A server that sends `reply` and closes.
fn replies(reply: impl Into<Vec<u8>>) -> Server {
    let reply = reply.into();
    server(move |_, mut stream| {
        // The client may have hung up on purpose.
        let _ = stream.write_all(&reply);
    })
}

#[tokio::test]
async fn a_call_is_asked_and_answered() {
    let server = server(|request, mut stream| {
        assert_eq!(
            request,
            r#"{"method":"containerManager.Signal","arg":{"CID":"c","Signo":15,"PID":7,"Mode":2}}"#
        );
        // In pieces, as a stream may deliver it.
        for piece in [r#"{"success":true,"#, r#""err":"","result"#, r#"":{}}"#] {
            stream.write_all(piece.as_bytes()).unwrap();
            stream.flush().unwrap();
            std::thread::park_timeout(Duration::from_millis(20));
        }
    });
    server
        .client
        .signal("c", Target::ForegroundGroup(7), 15)
        .await
        .unwrap();
    server.thread.join().unwrap();
}

#[tokio::test]
async fn descriptors_go_with_the_first_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut first = [0];
        let mut space = nix::cmsg_space!([i32; 3]);
        let mut parts = [std::io::IoSliceMut::new(&mut first)];
        let flags = MsgFlags::empty();
        let message =
            recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).unwrap();
        let got = message
            .cmsgs()
            .unwrap()
            .any(|m| matches!(m, ControlMessageOwned::ScmRights(fds) if fds.len() == 3));
        assert!(got);
        // A request larger than the socket's buffer must arrive whole.
        let mut rest = vec![0; 1 << 20];
        let mut total = 1;
        while total < 700_000 {
            total += stream.read(&mut rest).unwrap();
        }
        stream
            .write_all(br#"{"success":true,"err":"","result":42}"#)
            .unwrap();
    });
    let client = Client::new(&path, std::process::id(), PATIENCE);
    let null = std::fs::File::open("/dev/null").unwrap();
    let args = ExecArgs {
        envv: vec!["x".repeat(700_000)],
        ..ExecArgs::default()
    };
    let fd = null.as_fd();
    assert_eq!(client.exec(&args, [fd, fd, fd]).await.unwrap(), 42);
    thread.join().unwrap();
}

#[test]
fn exec_arguments_have_gos_names() {
    let args = ExecArgs {
        guest_fds: [0, 1, 2],
        container: "c".into(),
        ..ExecArgs::default()
    };
    assert_eq!(
        serde_json::to_string(&args).unwrap(),
        concat!(
            r#"{"argv":[],"envv":[],"wd":"","KUID":0,"KGID":0,"ExtraKGIDs":[],"NoNewPrivileges":false,"#,
            r#""Capabilities":{"PermittedCaps":0,"InheritableCaps":0,"EffectiveCaps":0,"BoundingCaps":0,"AmbientCaps":0},"#,
            r#""StdioIsPty":false,"GuestFDs":[0,1,2],"ContainerID":"c"}"#
        )
    );
}

#[tokio::test]
async fn refusals_are_told_apart_and_cleaned() {
    let server = replies(r#"{"success":false,"err":"no\nsuch\u001b process","result":null}"#);
    match server.client.wait("c").await.unwrap_err() {
        ControlError::Refused(message) => assert_eq!(message, "no such process"),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn replies_that_are_none_are_protocol_errors() {
    for reply in [
        "garbage",
        "[]",
        "\0\0\0\0",
        "{\"success\":maybe}",
        "{\"success\":true,\"err\":\"\",\"result\":\"text\"}",
        "{\"success\":true,\"err\":\"\",\"result\":-1}",
        "{\"success\":true,\"err\":\"\",\"result\":99999999999}",
        "{\"success\":true,\"err\":\"\"}",
        "{\"success\":true,\"result\":1}{\"success\":true,\"result\":2}",
        "{\"success\":true,\"result\":1}x",
        "{\"err\":7}",
    ] {
        let error = replies(reply).client.wait("c").await.unwrap_err();
        assert!(
            matches!(error, ControlError::Protocol(_)),
            "{reply}: {error}"
        );
    }
    let deep = format!(
        "{{\"result\":{}{}}}",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    let error = replies(deep).client.wait("c").await.unwrap_err();
    assert!(matches!(error, ControlError::Protocol(_)), "{error}");
}

#[tokio::test]
async fn a_reply_that_stops_half_way_is_a_broken_connection() {
    for reply in ["", "{", "{\"success\":true,\"result\":\""] {
        let error = replies(reply).client.wait("c").await.unwrap_err();
        assert!(matches!(error, ControlError::Broken(_)), "{reply}: {error}");
    }
}

#[tokio::test]
async fn replies_of_any_size_are_cut_off() {
    for end_of_string in [false, true] {
        let server = server(move |_, mut stream| {
            let start = if end_of_string {
                "{\"err\":\""
            } else {
                "{\"result\":["
            };
            stream.write_all(start.as_bytes()).unwrap();
            // Until the client hangs up.
            while stream.write_all(&[b'1'; 65536]).is_ok() {}
        });
        let error = server.client.runtime_state("c").await.unwrap_err();
        assert!(matches!(error, ControlError::Protocol(_)), "{error}");
        server.thread.join().unwrap();
    }
}

#[tokio::test]
async fn lists_may_be_long_but_not_endless() {
    let process = r#"{"uid":0,"pid":1,"ppid":0,"threads":[1],"cmd":"sleep","new":{"x":[]}}"#;
    let list = vec![process; 20_000].join(",");
    let server = replies(format!(r#"{{"success":true,"err":"","result":[{list}]}}"#));
    assert_eq!(server.client.processes("c").await.unwrap().len(), 20_000);
    let server = replies(format!(r#"{{"success":true,"err":"","result":[{list}]}}"#));
    assert!(matches!(
        server.client.event("c").await.unwrap_err(),
        ControlError::Protocol(_)
    ));
}

#[tokio::test]
async fn a_slow_answer_ends_at_the_deadline() {
    let server = server(|_, mut stream| {
        // One byte at a time is no way to stretch the deadline.
        stream.write_all(b"{\"err\":\"").unwrap();
        while stream.write_all(b"x").is_ok() {
            std::thread::park_timeout(Duration::from_millis(50));
        }
    });
    let answer = tokio::time::timeout(PATIENCE, server.hasty().event("c")).await;
    let error = answer.unwrap().unwrap_err();
    assert!(matches!(error, ControlError::Timeout(_)), "{error}");
    server.thread.join().unwrap();
}

#[tokio::test]
async fn waiting_has_no_deadline() {
    let server = server(|_, mut stream| {
        std::thread::park_timeout(Duration::from_secs(3));
        stream
            .write_all(br#"{"success":true,"err":"","result":768}"#)
            .unwrap();
    });
    assert_eq!(server.hasty().wait("c").await.unwrap(), 0x300);
}

#[tokio::test]
async fn descriptors_in_a_reply_are_refused_and_closed() {
    let (mut probe, held) = std::io::pipe().unwrap();
    let server = server(move |_, stream| {
        let reply = br#"{"success":true,"err":"","result":1}"#;
        let fds = [held.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<UnixAddr>(
            stream.as_raw_fd(),
            &[IoSlice::new(reply)],
            &rights,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    });
    let error = server.client.wait("c").await.unwrap_err();
    assert!(error.to_string().contains("descriptors"), "{error}");
    server.thread.join().unwrap();
    // The sender's end is closed now; end of file shows that no other is left.
    let read = tokio::task::spawn_blocking(move || probe.read(&mut [0]).unwrap());
    assert_eq!(
        tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap(),
        0
    );
}

#[tokio::test]
async fn another_process_at_the_socket_is_refused() {
    let server = replies("{}");
    let path = server.client.socket.clone();
    let client = Client::new(&path, 1, PATIENCE);
    let error = client.wait("c").await.unwrap_err();
    assert!(error.to_string().contains("not the sandbox"), "{error}");
    assert!(matches!(error, ControlError::Connect(_)));
    // Lets the server's thread end.
    let _ = server.client.wait("c").await;
}

#[tokio::test]
async fn a_socket_that_is_not_there_is_a_failed_connection() {
    let client = Client::new(Path::new("/no/such.sock"), 1, PATIENCE);
    assert!(matches!(
        client.pause().await.unwrap_err(),
        ControlError::Connect(_)
    ));
}

#[tokio::test]
async fn long_socket_paths_can_be_reached() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("d".repeat(120));
    std::fs::create_dir(&long).unwrap();
    let fd = std::fs::File::open(&long).unwrap();
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/s", fd.as_raw_fd())).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]).unwrap();
        stream
            .write_all(br#"{"success":true,"err":"","result":2}"#)
            .unwrap();
    });
    let client = Client::new(&long.join("s"), std::process::id(), PATIENCE);
    assert_eq!(
        client.runtime_state("c").await.unwrap(),
        RuntimeState::Running
    );
    thread.join().unwrap();
}
