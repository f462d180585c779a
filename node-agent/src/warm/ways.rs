// SPDX-License-Identifier: Apache-2.0

//! Finds how sandboxes of a runtime are made and started at the least cost, by trials.

use kiln_agent_api::Shape;
use runsc_wrapper::{Forms, Release, StartWay};
use tracing::warn;

use super::boot::{BootError, Booter};

/// How sandboxes are made and started, by what has passed its trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ways {
    /// Whether the runtime's release is in the table of those that were tested.
    pub(crate) is_known: bool,
    /// How a sandbox that was booted ahead is started.
    pub(crate) start: StartWay,
    /// Whether sandboxes read their root file system from an image, without a gofer.
    pub(crate) image: bool,
    /// Whether a gofer for the first container is made ahead with each sandbox.
    pub(crate) gofers: bool,
}

impl Ways {
    /// `ControlSocket` or `Command`.
    pub(crate) fn start_name(self) -> &'static str {
        match self.start {
            StartWay::Command => "Command",
            StartWay::Control(_) => "ControlSocket",
        }
    }
}

/// Commands, which every release has.
const COMMANDS: Forms = Forms {
    start: StartWay::Command,
    gofers: false,
};

/// Finds the best way that works with sandboxes of `shape`, and a booter that makes such.
///
/// # Errors
/// When none works.
pub(crate) async fn find(
    booter: Booter,
    shape: &Shape,
    release: &Release,
) -> Result<(Booter, Ways), BootError> {
    let image = booter.clone().with_image();
    for forms in release.forms.iter().copied().chain([COMMANDS]) {
        match image.trial(shape, forms.start).await {
            Ok(()) => return Ok(with_gofers(image, shape, forms, release).await),
            Err(e) => warn!("adoption from an image, way {:?}: {e}", forms.start),
        }
    }
    booter.trial(shape, StartWay::Command).await?;
    let ways = Ways {
        is_known: release.is_known,
        start: StartWay::Command,
        image: false,
        gofers: false,
    };
    Ok((booter, ways))
}

/// Adds gofers that are made ahead, where `forms` may have them and they work.
async fn with_gofers(
    booter: Booter,
    shape: &Shape,
    forms: Forms,
    release: &Release,
) -> (Booter, Ways) {
    let mut ways = Ways {
        is_known: release.is_known,
        start: forms.start,
        image: true,
        gofers: false,
    };
    if !forms.gofers {
        return (booter, ways);
    }
    let tried = async {
        let with = booter.clone().with_slots().await?;
        with.trial_of_slots(shape, forms.start).await?;
        Ok::<_, BootError>(with)
    };
    match tried.await {
        Ok(with) => {
            ways.gofers = true;
            (with, ways)
        }
        Err(e) => {
            warn!("containers are made by command: {e}");
            (booter, ways)
        }
    }
}
