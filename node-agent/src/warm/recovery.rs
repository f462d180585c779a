// SPDX-License-Identifier: Apache-2.0

//! What an agent does with the sandboxes that another has left: it takes them up, or it destroys
//! them all.

use std::{
    fs,
    io::ErrorKind::{ReadOnlyFilesystem, ResourceBusy},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use tracing::{error, info, warn};

use super::{
    boot::blocking,
    cgroup,
    manager::WarmManager,
    reload::Active,
    store::{Note, Place},
};
use kiln_node_install::exec_dir;

/// Sandboxes that are destroyed at a time when all are: for the most part that is waiting.
const DRAIN_CONCURRENCY: usize = 8;

impl WarmManager {
    /// Takes up what an earlier agent has left, and destroys what cannot be used.
    pub(super) async fn recover(self: &Arc<Self>, active: &Active) {
        for place in [Place::Booting, Place::Handed, Place::Retired, Place::Ready] {
            let store = self.store.clone();
            let left = match blocking("list sandboxes", move || store.list(place)).await {
                Ok(left) => left,
                Err(e) => return error!("recover: {e}"),
            };
            for (id, note) in left {
                self.recover_one(active, id, place, note).await;
            }
        }
        // Of shims that died while they took a sandbox, and nobody was there to see it.
        let cgroup = self.config.cgroup.clone();
        let swept = blocking("remove cgroups", move || {
            cgroup::remove_cgroups_below(&cgroup, Duration::ZERO);
            Ok(())
        });
        if let Err(e) = swept.await {
            warn!("{e}");
        }
    }

    async fn recover_one(
        self: &Arc<Self>,
        active: &Active,
        id: String,
        place: Place,
        note: Option<Note>,
    ) {
        let booter = &active.booter;
        match note {
            Some(note) if place == Place::Ready && active.runtime.makes(&note.shape) => {
                match booter.recover(&id, note).await {
                    Ok(sandbox) => {
                        info!("{id} is ready from before");
                        let mut state = self.state();
                        // The sandbox stays although no Pod has missed its shape since.
                        state.pool.learn(&sandbox.shape, Instant::now());
                        self.hold(&mut state, booter.clone(), sandbox);
                    }
                    Err(_) => booter.retire(id, place).await,
                }
            }
            _ if place == Place::Retired => booter.destroy(id).await,
            _ => booter.retire(id, place).await,
        }
    }

    /// Destroys every sandbox that nobody has taken, and removes the agent's directories. No
    /// other agent may run.
    ///
    /// # Errors
    /// When the runtime cannot be used, or something stays.
    pub async fn drain(&self) -> anyhow::Result<()> {
        self.state().let_go_of_all();
        let mut left = Vec::new();
        for place in Place::ALL {
            let store = self.store.clone();
            let there = blocking("list sandboxes", move || store.ids(place)).await?;
            left.extend(there.into_iter().map(|id| (id, place)));
        }
        // A node on which nothing was booted may have no runtime either.
        if !left.is_empty() {
            self.destroy_all(left).await?;
        }
        let (store, state) = (self.store.clone(), self.config.state.clone());
        let (gone, cgroup) = (state.clone(), self.config.cgroup.clone());
        blocking("check whether all are gone", move || store.check_empty()).await?;
        blocking("unmount what sandboxes execute", move || {
            exec_dir::unmount(&state)
        })
        .await?;
        blocking("remove the agent's directories", move || {
            cgroup::remove_cgroups_below(&cgroup, cgroup::END_TIME);
            cgroup::remove_cgroup(&cgroup, cgroup::END_TIME);
            match fs::remove_dir_all(gone) {
                // It is empty, and the node has given it to this container.
                Err(e) if matches!(e.kind(), ResourceBusy | ReadOnlyFilesystem) => Ok(()),
                done => done,
            }
        })
        .await?;
        Ok(())
    }

    async fn destroy_all(&self, sandboxes: Vec<(String, Place)>) -> anyhow::Result<()> {
        let booter = &self.booter(&self.read_runtime().await??);
        let destroy = async |(id, place)| match place {
            Place::Retired => booter.destroy(id).await,
            place => booter.retire(id, place).await,
        };
        stream::iter(sandboxes)
            .for_each_concurrent(DRAIN_CONCURRENCY, destroy)
            .await;
        Ok(())
    }
}
