// SPDX-License-Identifier: Apache-2.0
//! A registry that can only be read, on a socket of the host: the pull part of the OCI
//! distribution specification 1.1 (which is Docker's registry API v2).
//!
//! Repositories are found by path alone: containerd sends requests for all hosts here.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::digest::Digest;
use crate::image::{Image, MANIFEST};
use crate::reference::{is_repository, is_tag};

/// How long the requests under way have when the registry ends.
const GRACE: Duration = Duration::from_secs(2);

/// How long a client may take to send the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// The pause after a connection that could not be accepted, most likely for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A running registry. Dropped, it ends at once; [`Registry::shutdown`] lets clients finish.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: TaskGuard,
}

/// A task that ends with its owner.
#[derive(Debug)]
struct TaskGuard(JoinHandle<()>);

impl Drop for TaskGuard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Registry {
    /// Serves `images` on `listener`, in tasks of the current tokio runtime.
    ///
    /// # Errors
    /// The listener's address cannot be found out.
    pub fn start(images: &[Image], listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(serve(Arc::new(Shelf::new(images)), listener, stopped));
        Ok(Self {
            address,
            stop,
            task: TaskGuard(task),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more requests, and waits up to two seconds for those under way.
    pub async fn shutdown(mut self) {
        // A task that has gone already is what we want.
        let _ = self.stop.send(());
        let _ = (&mut self.task.0).await;
    }
}

async fn serve(shelf: Arc<Shelf>, listener: TcpListener, mut stopped: oneshot::Receiver<()>) {
    let graceful = GracefulShutdown::new();
    // Owns the connections: they end with this task.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            // A dropped sender means that this task is about to be aborted.
            _ = &mut stopped => break,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            sleep(ACCEPT_RETRY).await;
            continue;
        };
        let shelf = Arc::clone(&shelf);
        let service = service_fn(move |request: Request<Incoming>| {
            let shelf = Arc::clone(&shelf);
            async move { Ok::<_, Infallible>(shelf.answer(request.method(), request.uri().path())) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .serve_connection(TokioIo::new(stream), service);
        connections.spawn(graceful.watch(connection));
    }
    drop(listener);
    // Those that are not done by then are cut off with the set.
    let _ = timeout(GRACE, graceful.shutdown()).await;
}

/// Everything that can be asked for, by repository path.
struct Shelf(HashMap<String, Repository>);

#[derive(Default)]
struct Repository {
    tags: HashMap<String, Digest>,
    manifests: HashMap<Digest, Bytes>,
    blobs: HashMap<Digest, Bytes>,
}

/// What a path asks for.
#[derive(Debug, PartialEq)]
enum Route<'a> {
    /// Whether this is a registry.
    Version,
    Manifest {
        repository: &'a str,
        name: ManifestName<'a>,
    },
    Blob {
        repository: &'a str,
        digest: Digest,
    },
}

#[derive(Debug, PartialEq)]
enum ManifestName<'a> {
    Tag(&'a str),
    Digest(Digest),
}

/// An answer other than 200, with the error code of the specification.
#[derive(Debug, PartialEq)]
struct Refusal(StatusCode, &'static str);

impl<'a> Route<'a> {
    fn parse(path: &'a str) -> Result<Self, Refusal> {
        const ELSEWHERE: Refusal = Refusal(StatusCode::NOT_FOUND, "UNSUPPORTED");
        const BAD_DIGEST: Refusal = Refusal(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
        let Some(rest) = path.strip_prefix("/v2") else {
            return Err(ELSEWHERE);
        };
        if matches!(rest, "" | "/") {
            return Ok(Route::Version);
        }
        let parts = rest
            .strip_prefix('/')
            .and_then(|rest| rest.rsplit_once('/'));
        let parts = parts.and_then(|(rest, name)| Some((rest.rsplit_once('/')?, name)));
        let ((repository, kind), name) = parts.ok_or(ELSEWHERE)?;
        if !matches!(kind, "manifests" | "blobs") {
            return Err(ELSEWHERE);
        }
        if !is_repository(repository) {
            return Err(Refusal(StatusCode::BAD_REQUEST, "NAME_INVALID"));
        }
        if kind == "manifests" && !name.contains(':') {
            let unknown = Refusal(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
            return if is_tag(name) {
                Ok(Route::Manifest {
                    repository,
                    name: ManifestName::Tag(name),
                })
            } else {
                Err(unknown)
            };
        }
        let digest = name.parse().map_err(|_| BAD_DIGEST)?;
        Ok(match kind {
            "manifests" => Route::Manifest {
                repository,
                name: ManifestName::Digest(digest),
            },
            _ => Route::Blob { repository, digest },
        })
    }
}

impl Shelf {
    fn new(images: &[Image]) -> Self {
        let mut shelf: HashMap<String, Repository> = HashMap::new();
        for image in images {
            for reference in &image.references {
                let repository = shelf.entry(reference.repository.clone()).or_default();
                repository
                    .tags
                    .insert(reference.tag.clone(), image.manifest.digest);
                repository
                    .manifests
                    .insert(image.manifest.digest, image.manifest.bytes.clone());
                repository
                    .blobs
                    .extend(image.blobs().map(|b| (b.digest, b.bytes)));
            }
        }
        Self(shelf)
    }

    /// The response to a request. The body of one to HEAD is left out by hyper, which keeps its length.
    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        let found = if matches!(*method, Method::GET | Method::HEAD) {
            Route::parse(path).and_then(|route| self.find(&route))
        } else {
            Err(Refusal(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED"))
        };
        let (status, kind, digest, body) = match found {
            Ok(Found {
                kind,
                digest,
                bytes,
            }) => (StatusCode::OK, kind, digest, bytes),
            Err(Refusal(status, code)) => {
                let body =
                    json!({ "errors": [{ "code": code, "message": status.canonical_reason() }] });
                (status, "application/json", None, body.to_string().into())
            }
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(
            "docker-distribution-api-version",
            HeaderValue::from_static("registry/2.0"),
        );
        if let Some(value) = digest.and_then(|d| HeaderValue::try_from(d.to_string()).ok()) {
            headers.insert("docker-content-digest", value);
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }

    fn find(&self, route: &Route<'_>) -> Result<Found, Refusal> {
        let unknown = |code| move || Refusal(StatusCode::NOT_FOUND, code);
        match route {
            Route::Version => Ok(Found {
                kind: "application/json",
                digest: None,
                bytes: Bytes::from_static(b"{}"),
            }),
            Route::Manifest { repository, name } => {
                let manifest = || {
                    let repository = self.0.get(*repository)?;
                    let digest = match name {
                        ManifestName::Tag(tag) => *repository.tags.get(*tag)?,
                        ManifestName::Digest(digest) => *digest,
                    };
                    let bytes = repository.manifests.get(&digest)?.clone();
                    Some(Found {
                        kind: MANIFEST,
                        digest: Some(digest),
                        bytes,
                    })
                };
                manifest().ok_or_else(unknown("MANIFEST_UNKNOWN"))
            }
            Route::Blob { repository, digest } => {
                let bytes = self
                    .0
                    .get(*repository)
                    .and_then(|r| r.blobs.get(digest))
                    .cloned();
                let bytes = bytes.ok_or_else(unknown("BLOB_UNKNOWN"))?;
                Ok(Found {
                    kind: "application/octet-stream",
                    digest: Some(*digest),
                    bytes,
                })
            }
        }
    }
}

struct Found {
    kind: &'static str,
    digest: Option<Digest>,
    bytes: Bytes,
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::image::Config;
    use crate::layer::LayerBuilder;

    fn image() -> Image {
        let mut layer = LayerBuilder::new();
        layer.file("a", 0o644, b"a").unwrap();
        let references = vec![
            "docker.io/library/a:1".parse().unwrap(),
            "quay.io/b:2".parse().unwrap(),
        ];
        Image::new(
            "a",
            references,
            vec![layer.finish(None).unwrap()],
            Config::default(),
        )
        .unwrap()
    }

    async fn started() -> (Image, Registry) {
        let image = image();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let registry = Registry::start(std::slice::from_ref(&image), listener).unwrap();
        (image, registry)
    }

    /// Sends one request as it stands and gives the head and the body of the response.
    async fn ask(registry: &Registry, method: &str, path: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(registry.address()).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).await.unwrap();
        let end = response.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        (
            String::from_utf8(response[..end].to_vec())
                .unwrap()
                .to_lowercase(),
            response[end + 4..].to_vec(),
        )
    }

    #[tokio::test]
    async fn manifests_and_blobs_come_by_tag_and_by_digest() {
        let (image, registry) = started().await;
        let manifest = image.manifest.digest;
        for path in [
            "library/a/manifests/1",
            "b/manifests/2",
            &format!("library/a/manifests/{manifest}"),
            &format!("b/manifests/{manifest}"),
        ] {
            let path = format!("/v2/{path}");
            let (head, body) = ask(&registry, "GET", &path).await;
            assert!(head.starts_with("http/1.1 200 "), "{path}: {head}");
            assert!(head.contains(&format!("docker-content-digest: {manifest}")));
            assert!(head.contains(&format!("content-type: {MANIFEST}")));
            assert_eq!(body, image.manifest.bytes);
            let (same_head, body) = ask(&registry, "HEAD", &path).await;
            let but_date = |head: &str| {
                head.lines()
                    .filter(|l| !l.starts_with("date:"))
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            assert_eq!(but_date(&same_head), but_date(&head));
            assert!(head.contains(&format!("content-length: {}", image.manifest.bytes.len())));
            assert_eq!(body, b"");
        }
        for blob in image.blobs() {
            // The query is how containerd tells a mirror the host that it stands in for.
            let path = format!("/v2/library/a/blobs/{}?ns=docker.io", blob.digest);
            let (head, body) = ask(&registry, "GET", &path).await;
            assert!(head.starts_with("http/1.1 200 "));
            assert_eq!(body, blob.bytes);
            let (head, body) = ask(&registry, "HEAD", &path).await;
            assert!(head.contains(&format!("content-length: {}", blob.bytes.len())));
            assert_eq!(body, b"");
        }
        assert!(
            ask(&registry, "GET", "/v2/")
                .await
                .0
                .starts_with("http/1.1 200 ")
        );
        registry.shutdown().await;
    }

    #[tokio::test]
    async fn what_is_not_there_is_refused_with_the_code_of_the_specification() {
        let (image, registry) = started().await;
        let (manifest, config) = (image.manifest.digest, image.config.digest);
        let long = "a".repeat(300);
        let cases = [
            ("GET", "/v2/library/a/manifests/2", 404, "MANIFEST_UNKNOWN"),
            ("GET", "/v2/library/b/manifests/2", 404, "MANIFEST_UNKNOWN"),
            (
                "GET",
                &format!("/v2/library/a/manifests/{config}"),
                404,
                "MANIFEST_UNKNOWN",
            ),
            (
                "GET",
                &format!("/v2/library/a/blobs/{manifest}"),
                404,
                "BLOB_UNKNOWN",
            ),
            ("GET", &format!("/v2/c/blobs/{config}"), 404, "BLOB_UNKNOWN"),
            ("GET", "/v2/library/a/blobs/latest", 400, "DIGEST_INVALID"),
            (
                "GET",
                "/v2/library/a/manifests/sha256:../../../etc/passwd",
                404,
                "UNSUPPORTED",
            ),
            (
                "GET",
                "/v2/library/a/manifests/sha256:00",
                400,
                "DIGEST_INVALID",
            ),
            ("GET", "/v2/library/a/manifests/", 404, "MANIFEST_UNKNOWN"),
            ("GET", "/v2/library/a/manifests/..", 404, "MANIFEST_UNKNOWN"),
            (
                "GET",
                "/v2/library/a/manifests/%2e%2e",
                404,
                "MANIFEST_UNKNOWN",
            ),
            (
                "GET",
                "/v2/../../etc/passwd/manifests/1",
                400,
                "NAME_INVALID",
            ),
            ("GET", "/v2/library//a/manifests/1", 400, "NAME_INVALID"),
            ("GET", "/v2//manifests/1", 400, "NAME_INVALID"),
            ("GET", "/v2/manifests/1", 404, "UNSUPPORTED"),
            (
                "GET",
                &format!("/v2/{long}/manifests/1"),
                400,
                "NAME_INVALID",
            ),
            ("GET", "/v2/library/a/tags/list", 404, "UNSUPPORTED"),
            ("GET", "/etc/passwd", 404, "UNSUPPORTED"),
            ("GET", "/", 404, "UNSUPPORTED"),
            ("GET", "/v2evil/library/a/manifests/1", 404, "UNSUPPORTED"),
            ("PUT", "/v2/library/a/manifests/1", 405, "UNSUPPORTED"),
            ("POST", "/v2/library/a/blobs/uploads/", 405, "UNSUPPORTED"),
            ("DELETE", "/v2/library/a/manifests/1", 405, "UNSUPPORTED"),
        ];
        for (method, path, status, code) in cases {
            let (head, body) = ask(&registry, method, path).await;
            assert!(
                head.starts_with(&format!("http/1.1 {status} ")),
                "{method} {path}: {head}"
            );
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["errors"][0]["code"], code, "{method} {path}");
        }
        registry.shutdown().await;
    }

    #[tokio::test]
    async fn shutdown_does_not_wait_for_idle_clients() {
        let (_, registry) = started().await;
        let address = registry.address();
        let mut idle = TcpStream::connect(address).await.unwrap();
        timeout(Duration::from_secs(1), registry.shutdown())
            .await
            .unwrap();
        assert_eq!(idle.read(&mut [0]).await.unwrap_or(0), 0);
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn shutdown_does_not_wait_for_clients_that_may_ask_again() {
        let (_, registry) = started().await;
        let mut client = TcpStream::connect(registry.address()).await.unwrap();
        client
            .write_all(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        assert!(client.read(&mut [0; 1000]).await.unwrap() > 0);
        timeout(Duration::from_secs(1), registry.shutdown())
            .await
            .unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn a_dropped_registry_is_gone() {
        let (_, registry) = started().await;
        let address = registry.address();
        let mut idle = TcpStream::connect(address).await.unwrap();
        drop(registry);
        assert_eq!(idle.read(&mut [0]).await.unwrap_or(0), 0);
        assert!(TcpStream::connect(address).await.is_err());
    }
}
