// SPDX-License-Identifier: Apache-2.0

//! One node, seen from itself.

mod facts;
pub(crate) mod install;
pub(crate) mod preflight;
pub(crate) mod status;
