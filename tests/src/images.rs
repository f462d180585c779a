// SPDX-License-Identifier: Apache-2.0

//! The test images of crate `kiln-images`, made once per test binary and served to each node.

use std::{env, net::TcpListener, path::Path};

use anyhow::{Context, Result};
use kiln_images::{Images, Registry, Sources, guest, hosts};
use tokio::sync::OnceCell;

use crate::{netns::Netns, tools};

static IMAGES: OnceCell<Images> = OnceCell::const_new();

/// All images. `$KILN_GUEST` names the program inside of them; otherwise cargo builds it.
async fn images() -> Result<&'static Images> {
    IMAGES
        .get_or_try_init(|| async {
            let guest = match env::var_os("KILN_GUEST") {
                Some(path) => path.into(),
                None => {
                    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
                        .parent()
                        .context("no workspace")?;
                    guest::build(workspace).await?
                }
            };
            Ok(Images::build(&Sources::in_cache(&tools::cache()?, guest)).await?)
        })
        .await
}

/// Serves all images on the loopback of `netns`, and has the containerd whose registry
/// configuration is in `certs_dir` pull every image from there.
pub(crate) async fn serve(netns: &Netns, certs_dir: &Path) -> Result<Registry> {
    let listener = netns.run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen for pulls")?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })?;
    let registry = images()
        .await?
        .serve(tokio::net::TcpListener::from_std(listener)?)?;
    hosts::write(certs_dir, registry.address()).context("write hosts.toml")?;
    Ok(registry)
}

/// Writes an image as an archive for `ctr images import` into `dir`, which is made if it is not there.
///
/// # Errors
/// When there is no image of this full name, or it cannot be written.
pub async fn export(reference: &str, dir: &Path) -> Result<()> {
    let image = images().await?.find(reference);
    let image = image.with_context(|| format!("no image {reference}"))?;
    kiln_images::archive::export(std::slice::from_ref(image), dir).context("export an image")?;
    Ok(())
}
