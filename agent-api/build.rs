// SPDX-License-Identifier: Apache-2.0

//! Makes messages and stubs from the files in `proto`.

use std::{env, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = env::var("OUT_DIR")?;
    let out = Path::new(&out);
    Codegen::new()
        .inputs(["proto/agent.proto", "proto/shim.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(
            ProtobufCustomize::default()
                .gen_mod_rs(false)
                // Without what a shim would keep in memory for reflection.
                .lite_runtime(true),
        )
        .customize(Customize {
            async_all: true,
            ..Customize::default()
        })
        .out_dir(out)
        .run()?;
    // An included file must not begin with attributes of a crate.
    for name in ["agent.rs", "agent_ttrpc.rs", "shim.rs", "shim_ttrpc.rs"] {
        let file = out.join(name);
        let text = fs::read_to_string(&file)?;
        let inner = text
            .lines()
            .filter(|l| !l.starts_with("#![") && !l.starts_with("//!"));
        fs::write(&file, inner.collect::<Vec<_>>().join("\n"))?;
    }
    println!("cargo::rerun-if-changed=proto");
    Ok(())
}
