// SPDX-License-Identifier: Apache-2.0

//! Certificates of a cluster: one authority, and what it vouches for.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The authority, and the directory that it writes to.
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// Whom a certificate is for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Subject<'a> {
    /// Common name: Kubernetes' name of a user.
    pub name: &'a str,
    /// Organisation: Kubernetes' name of a group.
    pub group: &'a str,
    /// Names that a server is reached by.
    pub dns: &'a [&'a str],
    /// Addresses that a server is reached at.
    pub ips: &'a [IpAddr],
}

impl Pki {
    /// Makes an authority, with `ca.crt` and `ca.key`, and keys for service accounts,
    /// `sa.key` and `sa.pub`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "kiln-test-ca");
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        fs::write(dir.join("ca.crt"), certificate.pem())?;
        fs::write(dir.join("ca.key"), key.serialize_pem())?;
        let service_accounts = KeyPair::generate()?;
        fs::write(dir.join("sa.key"), service_accounts.serialize_pem())?;
        fs::write(dir.join("sa.pub"), service_accounts.public_key_pem())?;
        Ok(Self {
            dir: dir.to_owned(),
            issuer: Issuer::new(params, key),
        })
    }

    /// Writes `file.crt` and `file.key` for a subject.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn certify(&self, file: &str, subject: Subject<'_>) -> Result<()> {
        let mut params = CertificateParams::new(
            subject
                .dns
                .iter()
                .map(|&n| n.to_owned())
                .collect::<Vec<_>>(),
        )?;
        params
            .subject_alt_names
            .extend(subject.ips.iter().map(|ip| SanType::IpAddress(*ip)));
        params
            .distinguished_name
            .push(DnType::CommonName, subject.name);
        params
            .distinguished_name
            .push(DnType::OrganizationName, subject.group);
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::write(self.path(file, "crt"), certificate.pem())?;
        fs::write(self.path(file, "key"), key.serialize_pem())?;
        Ok(())
    }

    /// Certifies a client and writes `file.conf`, a kubeconfig for it; returns its path.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn kubeconfig(&self, file: &str, subject: Subject<'_>, server: &str) -> Result<PathBuf> {
        self.certify(file, subject)?;
        let path = self.path(file, "conf");
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {
                "server": server, "certificate-authority": self.path("ca", "crt"),
            }}],
            "users": [{"name": "u", "user": {
                "client-certificate": self.path(file, "crt"), "client-key": self.path(file, "key"),
            }}],
        });
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// Path of a file: `ca`, `sa`, or what was certified, with `crt`, `key`, `pub` or
    /// `conf`.
    #[must_use]
    pub fn path(&self, file: &str, kind: &str) -> PathBuf {
        self.dir.join(format!("{file}.{kind}"))
    }
}
