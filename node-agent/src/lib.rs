// SPDX-License-Identifier: Apache-2.0

//! The agent of a node: boots sandboxes before there are Pods for them, and gives each to one
//! shim, once.
//!
//! [`warm`] has the sandboxes, [`serve`] the sockets that shims connect to, [`cluster`] the node's
//! objects in Kubernetes, and [`installer`] what Pods of the class need on the node.

pub mod cluster;
pub mod installer;
pub mod report;
pub mod serve;
pub mod snapshots;
pub mod warm;
