// SPDX-License-Identifier: Apache-2.0

//! Private Kubernetes control planes for tests.

#![forbid(unsafe_code)]

pub mod control_plane;
pub mod controller;
pub mod pki;
pub mod standin;
