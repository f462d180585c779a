// SPDX-License-Identifier: Apache-2.0

//! `containerd-shim-kiln-v2`: see the library for what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    kiln_shim::cli::main()
}
