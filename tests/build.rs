// SPDX-License-Identifier: Apache-2.0

//! Generates the CRI client from `proto/cri-v1.proto`. The compiler is `protox`, so that a build
//! needs no `protoc` on the machine, which the published bindings of CRI do.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = protox::compile(["proto/cri-v1.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(files)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
