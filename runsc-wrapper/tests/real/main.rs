// SPDX-License-Identifier: Apache-2.0

//! The library against real runtimes: lives of sandboxes and containers, on the host's kernel.
//!
//! Programs come from `${KILN_CACHE:-~/.cache/kiln}/bin`. A test whose program is not there
//! prints that it is skipped.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

mod egress;
mod exec;
mod failures;
mod gofer;
mod life;
mod sandbox;
mod world;
