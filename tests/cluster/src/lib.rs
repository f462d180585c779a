// SPDX-License-Identifier: Apache-2.0

//! Private Kubernetes for tests: control planes alone, with a stand-in for nodes, and a whole
//! cluster of one node.

#![forbid(unsafe_code)]

pub mod account;
pub mod cluster;
pub mod control_plane;
pub mod controller;
pub mod mission;
pub mod pki;
pub mod python;
pub mod standin;
pub mod system;
