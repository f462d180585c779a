// SPDX-License-Identifier: Apache-2.0

//! State of Sandboxes between two reconciles.

use crate::blocked::Reported;

/// See the module.
#[derive(Default)]
pub(crate) struct State {
    pub(super) reported: Reported,
}
