// SPDX-License-Identifier: Apache-2.0

//! TLS of a listener, with a certificate that is read again when its files change.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring::default_provider},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{Accept, TlsAcceptor};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::bounds::BUFFER;

/// How often the files are looked at. The kubelet takes up to a minute to change them.
const LOOK: Duration = Duration::from_secs(10);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum BadCertificate {
    /// A file.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// What is in a file.
    #[error("{} has no certificate, or no key, as PEM", .path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: pem::Error,
    },
    /// What is in both files.
    #[error("the certificate and its key cannot be used together")]
    Pair(#[from] rustls::Error),
}

/// Files with a certificate and its key.
#[derive(Debug, Clone)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

/// What is in the files.
#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// TLS of a listener.
pub struct Tls {
    acceptor: TlsAcceptor,
    current: Arc<Current>,
    files: Files,
}

/// The certificate that clients are shown.
struct Current {
    provider: CryptoProvider,
    key: RwLock<Arc<CertifiedKey>>,
}

impl Tls {
    /// TLS with the certificate, and those that it depends on, and the key of two PEM files.
    ///
    /// # Errors
    /// When they cannot be read, or are no pair.
    pub fn new(certificate: &Path, key: &Path) -> Result<Arc<Self>, BadCertificate> {
        let provider = default_provider();
        let files = Files {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
        };
        let pair = files.pair(&files.read()?, &provider)?;
        let current = Arc::new(Current {
            provider: provider.clone(),
            key: RwLock::new(Arc::new(pair)),
        });
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(Self {
            acceptor: Arc::new(config).into(),
            current,
            files,
        }))
    }

    /// Reads the files again when they change, until `stop`. A certificate that cannot be read does
    /// not replace the one that is there.
    pub async fn reload(self: Arc<Self>, stop: CancellationToken) {
        let mut last = None;
        let reads = async {
            loop {
                let this = Arc::clone(&self);
                let read = tokio::task::spawn_blocking(move || this.files.read()).await;
                match read {
                    Ok(Ok(contents)) if last.as_ref() != Some(&contents) => {
                        self.replace(&contents, last.is_some());
                        last = Some(contents);
                    }
                    Ok(Err(e)) => warn!("{e}; the last certificate stays"),
                    Ok(Ok(_)) | Err(_) => {}
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = reads => {}
            () = stop.cancelled() => {}
        }
    }

    fn replace(&self, contents: &Contents, is_news: bool) {
        match self.files.pair(contents, &self.current.provider) {
            Ok(pair) => {
                let mut key = self.current.key.write();
                **key.as_mut().unwrap_or_else(|e| e.get_mut()) = Arc::new(pair);
                if is_news {
                    info!("the certificate has changed");
                }
            }
            Err(e) => warn!("{e}; the last certificate stays"),
        }
    }

    /// Does the handshake with a client.
    pub(crate) fn accept<S>(&self, stream: S) -> Accept<S>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let bounded = |tls: &mut rustls::ServerConnection| tls.set_buffer_limit(Some(BUFFER));
        self.acceptor.accept_with(stream, bounded)
    }
}

impl Files {
    fn read(&self) -> Result<Contents, BadCertificate> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| BadCertificate::Read {
                path: path.to_owned(),
                source,
            })
        };
        Ok(Contents {
            certificate: read(&self.certificate)?,
            key: read(&self.key)?,
        })
    }

    fn pair(
        &self,
        contents: &Contents,
        provider: &CryptoProvider,
    ) -> Result<CertifiedKey, BadCertificate> {
        let bad = |path: &Path| {
            let path = path.to_owned();
            |source| BadCertificate::Pem { path, source }
        };
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(&contents.certificate).collect();
        let chain = chain.map_err(bad(&self.certificate))?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(bad(&self.key))?;
        if chain.is_empty() {
            return Err(bad(&self.certificate)(pem::Error::NoItemsFound));
        }
        Ok(CertifiedKey::from_der(chain, key, provider)?)
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let key = self.key.read().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(&key))
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Current")
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertifiedKey as Made, generate_simple_self_signed};

    use super::*;

    fn write(folder: &Path, name: &str) -> Made<rcgen::KeyPair> {
        let made = generate_simple_self_signed([name.to_owned()]).unwrap();
        std::fs::write(folder.join("tls.crt"), made.cert.pem()).unwrap();
        std::fs::write(folder.join("tls.key"), made.signing_key.serialize_pem()).unwrap();
        made
    }

    fn shown(tls: &Tls) -> Vec<u8> {
        let key = tls.current.key.read().unwrap();
        key.cert[0].to_vec()
    }

    #[tokio::test(start_paused = true)]
    async fn a_certificate_that_changes_is_shown_and_a_bad_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
        assert!(Tls::new(&certificate, &key).is_err());
        let first = write(folder.path(), "a.example");
        let tls = Tls::new(&certificate, &key).unwrap();
        assert_eq!(shown(&tls), first.cert.der().to_vec());
        let stop = CancellationToken::new();
        let reload = tokio::spawn(Arc::clone(&tls).reload(stop.clone()));
        let second = write(folder.path(), "b.example");
        while shown(&tls) != second.cert.der().to_vec() {
            tokio::time::sleep(LOOK).await;
        }
        std::fs::write(&key, "no key").unwrap();
        tokio::time::sleep(LOOK * 3).await;
        assert_eq!(shown(&tls), second.cert.der().to_vec());
        stop.cancel();
        reload.await.unwrap();
    }
}
