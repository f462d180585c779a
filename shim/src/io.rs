// SPDX-License-Identifier: Apache-2.0

//! Stdio of a process.
//!
//! Without a terminal the runtime gets containerd's own FIFOs, so that output is copied
//! nowhere in between. The shim keeps one descriptor of each FIFO, open for both directions:
//! writers then survive a restart of containerd (their output waits in the FIFO instead of
//! failing with EPIPE), and a process sees the end of its input only after CloseIO. Letting go
//! of them when the process has ended is what gives containerd its end of file. If it is away
//! just then, a writer stays until it is back: a FIFO that nobody has open forgets its bytes.
//!
//! With a terminal the shim copies between the pty's master and the FIFOs. What is typed after
//! the process has ended is read and dropped until it is deleted, as by runc's shim: containerd
//! lets go of a terminal's output as soon as its input fails (ExecIO.Attach in its
//! internal/cri/io/exec_io.go), so that a FIFO without a reader would cost the last words.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSliceMut, Read},
    mem,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim::asynchronous::io::{IoTasks, Pty};
use nix::{
    cmsg_space,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use runsc_wrapper::Stdio;
use tokio::{
    net::{UnixListener, unix::pipe},
    task::JoinSet,
};

use crate::error::{Error, Result};

/// Pause between two looks for a reader of what a process has left in a FIFO.
const UNREAD_POLL: Duration = Duration::from_millis(100);

/// The stdio that containerd asked for: paths or `file://` URLs, empty when not wanted.
#[derive(Debug, Clone, Default)]
pub struct IoSpec {
    /// FIFO that the process reads.
    pub stdin: String,
    /// FIFO or `file://` for its output.
    pub stdout: String,
    /// FIFO or `file://` for its errors; not used with a terminal.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

impl IoSpec {
    /// Whether the process has no stdio at all.
    pub(crate) fn is_empty(&self) -> bool {
        !self.terminal
            && [&self.stdin, &self.stdout, &self.stderr]
                .iter()
                .all(|s| s.is_empty())
    }
}

/// The shim's side of a process's stdio. Dropping it lets go of everything.
#[derive(Default)]
pub(crate) struct ProcessIo {
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    stdin: Option<File>,
    outputs: Vec<File>,
    /// Each keeps an output until somebody reads it, or an input until nobody writes to it.
    lingering: JoinSet<()>,
    terminal: Option<Terminal>,
}

struct Terminal {
    pty: Pty,
    tasks: IoTasks,
    /// The FIFO that its input comes from, empty when there is none.
    stdin: String,
}

impl ProcessIo {
    /// Opens what `spec` names, for a process without a terminal, and returns the descriptors
    /// that the runtime hands to it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for anything but a FIFO or a `file://` of a regular file.
    pub(crate) fn open(spec: &IoSpec) -> Result<(Self, Stdio)> {
        let mut held = Held::default();
        let mut stdio = Stdio::default();
        if !spec.stdin.is_empty() {
            let path = fifo_path(&spec.stdin)?;
            held.stdin = Some(open_fifo(path, OpenOptions::new().read(true).write(true))?);
            stdio.stdin = Some(open_fifo(path, OpenOptions::new().read(true))?.into());
        }
        stdio.stdout = open_output(&spec.stdout, &mut held.outputs)?;
        stdio.stderr = open_output(&spec.stderr, &mut held.outputs)?;
        Ok((
            Self {
                held: Mutex::new(held),
            },
            stdio,
        ))
    }

    /// Copies between `master` and the FIFOs of `spec` until the terminal hangs up.
    pub(crate) fn attach_terminal(&self, spec: &IoSpec, master: OwnedFd) -> Result<()> {
        let what = |e: containerd_shim::Error| Error::Io {
            what: "copy the terminal".to_owned(),
            source: io::Error::other(e),
        };
        let pty = Pty::new(File::from(master)).map_err(what)?;
        let tasks = IoTasks::default();
        if !spec.stdout.is_empty() {
            fifo_path(&spec.stdout)?;
            tasks
                .copy_to_fifo(pty.clone(), &spec.stdout)
                .map_err(what)?;
        }
        if !spec.stdin.is_empty() {
            fifo_path(&spec.stdin)?;
            tasks
                .copy_from_fifo(&spec.stdin, pty.clone())
                .map_err(what)?;
        }
        self.lock().terminal = Some(Terminal {
            pty,
            tasks,
            stdin: spec.stdin.clone(),
        });
        Ok(())
    }

    /// Lets the process see the end of its input once containerd's writers are gone too.
    pub(crate) fn close_stdin(&self) {
        let mut held = self.lock();
        held.stdin = None;
        if let Some(terminal) = &held.terminal {
            terminal.tasks.close_input();
        }
    }

    /// Sets the size of the terminal; without one there is nothing to do, as runc's shim has it.
    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<()> {
        let held = self.lock();
        let Some(Terminal { pty, .. }) = &held.terminal else {
            return Ok(());
        };
        let size = libc::winsize {
            ws_row: height,
            ws_col: width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the descriptor is open for as long as `held` is locked, and TIOCSWINSZ only
        // reads the winsize that the pointer is valid for (tty_ioctl(4)).
        let rc = unsafe { libc::ioctl(pty.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        nix::errno::Errno::result(rc)
            .map(drop)
            .map_err(|e| Error::Io {
                what: "resize the terminal".to_owned(),
                source: e.into(),
            })
    }

    /// Delivers what is left of a terminal's output and lets go of everything.
    pub(crate) async fn finish(&self) {
        let terminal = {
            let mut held = self.lock();
            held.stdin = None;
            for output in mem::take(&mut held.outputs) {
                if let Some(output) = unread(output) {
                    held.lingering.spawn(until_read(output));
                }
            }
            let terminal = held.terminal.take();
            if let Some(input) = terminal.as_ref().and_then(|t| still_typed(&t.stdin)) {
                held.lingering.spawn(until_unwritten(input));
            }
            terminal
        };
        if let Some(Terminal { pty, tasks, .. }) = terminal {
            drop(pty);
            tasks.shutdown().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Nothing panics with the lock held, and `Held` has no invariant that could break.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets go of an output, or returns a writer that keeps what nobody is there to read.
fn unread(output: File) -> Option<File> {
    let magic = format!("/proc/self/fd/{}", output.as_raw_fd());
    let writer = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(magic);
    drop(output);
    writer.ok().filter(|writer| !is_read(writer))
}

async fn until_read(output: File) {
    while !is_read(&output) {
        tokio::time::sleep(UNREAD_POLL).await;
    }
}

/// A terminal's input, for as long as somebody may type into it.
fn still_typed(stdin: &str) -> Option<pipe::Receiver> {
    let path = fifo_path(stdin).ok()?;
    // Without it nobody can open the FIFO any more.
    let fifo = open_fifo(path, OpenOptions::new().read(true)).ok()?;
    pipe::Receiver::from_file(fifo).ok()
}

async fn until_unwritten(mut input: pipe::Receiver) {
    // However it ends, there is nothing more to read.
    tokio::io::copy(&mut input, &mut tokio::io::sink())
        .await
        .ok();
}

/// Whether somebody has the other end of a FIFO open: without a reader, polling a writer
/// reports an error (poll(2)).
fn is_read(writer: &File) -> bool {
    let mut fds = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    let error = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| r.contains(PollFlags::POLLERR));
    poll(&mut fds, PollTimeout::ZERO).is_err() || !fds.iter().any(error)
}

fn open_output(uri: &str, held: &mut Vec<File>) -> Result<Option<OwnedFd>> {
    if uri.is_empty() {
        return Ok(None);
    }
    if let Some(path) = uri.strip_prefix("file://") {
        return open_log_file(Path::new(path)).map(|f| Some(f.into()));
    }
    let path = fifo_path(uri)?;
    held.push(open_fifo(path, OpenOptions::new().read(true).write(true))?);
    // The hold above is a reader, so that this open cannot fail for want of one.
    open_fifo(path, OpenOptions::new().write(true)).map(|f| Some(f.into()))
}

fn fifo_path(uri: &str) -> Result<&Path> {
    if let Some((scheme, _)) = uri.split_once("://") {
        return Err(Error::InvalidArgument(format!(
            "stdio {uri:?}: scheme {scheme:?} is not supported; use a FIFO, or file:// for output"
        )));
    }
    let path = Path::new(uri);
    if path.is_absolute() && !uri.contains('\0') {
        return Ok(path);
    }
    Err(Error::InvalidArgument(format!(
        "stdio {uri:?}: must be an absolute path"
    )))
}

/// Opens a FIFO without waiting for its other end and without following a symbolic link.
fn open_fifo(path: &Path, options: &mut OpenOptions) -> Result<File> {
    // O_PATH first: opening a device or a socket by its name can have effects of its own.
    let named = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)
        .map_err(Error::io("open stdio", path))?;
    let kind = named
        .metadata()
        .map_err(Error::io("stat stdio", path))?
        .file_type();
    if !kind.is_fifo() {
        return Err(Error::InvalidArgument(format!(
            "stdio {}: not a FIFO",
            path.display()
        )));
    }
    let magic = PathBuf::from(format!("/proc/self/fd/{}", named.as_raw_fd()));
    let fifo = options
        .custom_flags(libc::O_NONBLOCK)
        .open(&magic)
        .map_err(Error::io("open stdio", path))?;
    // Not waiting was for the open alone: a process that finds its stdio non-blocking fails
    // with EAGAIN where it should wait.
    fcntl(&fifo, FcntlArg::F_SETFL(OFlag::empty()))
        .map_err(|e| Error::io("set up stdio", path)(e.into()))?;
    Ok(fifo)
}

fn open_log_file(path: &Path) -> Result<File> {
    if !path.is_absolute() {
        return Err(Error::InvalidArgument(format!(
            "stdio file://{}: must be absolute",
            path.display()
        )));
    }
    let file = OpenOptions::new()
        .append(true) // the sentry writes at offsets of its own; appending keeps two streams apart
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::io("open log file", path))?;
    if file
        .metadata()
        .map_err(Error::io("stat log file", path))?
        .is_file()
    {
        return Ok(file);
    }
    Err(Error::InvalidArgument(format!(
        "stdio file://{}: not a regular file",
        path.display()
    )))
}

/// Where a runtime sends the master of a pty it makes (OCI console socket).
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// How long the runtime may take from connecting to sending the descriptor.
const CONSOLE_DEADLINE: Duration = Duration::from_secs(10);

impl ConsoleSocket {
    /// Listens at `dir/name`, which must be short enough for a UNIX socket.
    pub(crate) fn bind(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        let listener = UnixListener::bind(&path).map_err(Error::io("listen on", &path))?;
        Ok(Self { listener, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the pty's master.
    pub(crate) async fn receive(&self) -> Result<OwnedFd> {
        let received = tokio::time::timeout(CONSOLE_DEADLINE, async {
            let (stream, _) = self.listener.accept().await?;
            loop {
                stream.readable().await?;
                match stream.try_io(tokio::io::Interest::READABLE, || {
                    receive_fd(stream.as_raw_fd())
                }) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done,
                }
            }
        });
        received
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Error::io("receive the terminal on", &self.path))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // Already gone is as good; the directory is removed with the bundle in any case.
        std::fs::remove_file(&self.path).ok();
    }
}

fn receive_fd(socket: RawFd) -> io::Result<OwnedFd> {
    let mut name = [0; 4096];
    let mut iov = [IoSliceMut::new(&mut name)];
    let mut space = cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket, &mut iov, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just installed these descriptors for us alone.
            let mut fds = fds
                .into_iter()
                .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            if let Some(master) = fds.next() {
                return Ok(master);
            }
        }
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "no descriptor in the message",
    ))
}

/// Reads a file of at most `cap` bytes: what comes from outside never fills memory.
pub(crate) fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(cap + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > cap {
        return Err(Error::InvalidArgument(format!(
            "{}: larger than {cap} bytes",
            path.display()
        )));
    }
    Ok(bytes)
}

/// What several holders share of one process's stdio.
pub(crate) type SharedIo = Arc<ProcessIo>;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::{sys::stat::Mode, unistd::mkfifo};
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn output_outlives_a_reader_that_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let spec = IoSpec {
            stdout: path.clone(),
            ..IoSpec::default()
        };
        let (io, stdio) = ProcessIo::open(&spec).unwrap();
        let mut out = File::from(stdio.stdout.unwrap());
        out.write_all(b"nobody reads yet").unwrap();
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        drop(out);
        io.finish().await;
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "nobody reads yet");
    }

    #[tokio::test]
    async fn output_of_a_process_that_has_ended_waits_for_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let spec = IoSpec {
            stdout: path.clone(),
            ..IoSpec::default()
        };
        let (io, stdio) = ProcessIo::open(&spec).unwrap();
        File::from(stdio.stdout.unwrap())
            .write_all(b"last words")
            .unwrap();
        io.finish().await;
        // As containerd opens it: waiting for a writer, reading to the end of file.
        let read = tokio::task::spawn_blocking(|| std::fs::read_to_string(path));
        assert_eq!(read.await.unwrap().unwrap(), "last words");
    }

    #[tokio::test]
    async fn what_is_typed_after_the_end_is_taken_until_it_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let spec = IoSpec {
            stdin: path.clone(),
            terminal: true,
            ..IoSpec::default()
        };
        let pty = nix::pty::openpty(None, None).unwrap();
        let io = ProcessIo::default();
        io.attach_terminal(&spec, pty.master).unwrap();
        let mut typist = pipe::OpenOptions::new().open_sender(&path).unwrap();
        drop(pty.slave);
        io.finish().await;
        // More than fits into the FIFO.
        let text = vec![b'x'; 1 << 20];
        typist.write_all(&text).await.unwrap();
        drop(io);
        tokio::task::yield_now().await;
        let error = typist.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn input_ends_only_after_close_io() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let (io, stdio) = ProcessIo::open(&IoSpec {
            stdin: path,
            ..IoSpec::default()
        })
        .unwrap();
        let mut input = File::from(stdio.stdin.unwrap());
        let mut byte = [0];
        fcntl(&input, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        assert_eq!(
            input.read(&mut byte).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        io.close_stdin();
        assert_eq!(input.read(&mut byte).unwrap(), 0);
    }

    #[test]
    fn a_process_gets_stdio_that_waits() {
        let dir = tempfile::tempdir().unwrap();
        let spec = IoSpec {
            stdin: fifo(dir.path(), "in"),
            stdout: fifo(dir.path(), "out"),
            ..IoSpec::default()
        };
        let (_io, stdio) = ProcessIo::open(&spec).unwrap();
        for fd in [stdio.stdin.unwrap(), stdio.stdout.unwrap()] {
            let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).unwrap());
            assert!(!flags.contains(OFlag::O_NONBLOCK));
        }
    }

    #[test]
    fn only_fifos_and_log_files_are_stdio() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(fifo(dir.path(), "real"), &link).unwrap();
        let path = |p: &Path| p.to_str().unwrap().to_owned();
        for stdout in [
            path(&file),
            path(&link),
            path(dir.path()),
            "/dev/null".to_owned(),
            "relative".to_owned(),
            "binary:///bin/sh?x".to_owned(),
            format!("file://{}", path(dir.path())),
            "file://relative".to_owned(),
        ] {
            let spec = IoSpec {
                stdout: stdout.clone(),
                ..IoSpec::default()
            };
            assert!(ProcessIo::open(&spec).is_err(), "{stdout}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
    }

    #[test]
    fn two_streams_append_to_one_log_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let uri = format!("file://{}", path.display());
        let spec = IoSpec {
            stdout: uri.clone(),
            stderr: uri,
            ..IoSpec::default()
        };
        let (_io, stdio) = ProcessIo::open(&spec).unwrap();
        File::from(stdio.stdout.unwrap())
            .write_all(b"out ")
            .unwrap();
        File::from(stdio.stderr.unwrap()).write_all(b"err").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"out err");
    }
}
