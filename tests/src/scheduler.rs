//! A scheduler as a test sees it.

use crate::proto::{Found, SchedulerSpec};
use crate::wait::LIMIT;
use crate::worker::client;
use kvring_adapter::{CallError, Client, Key, LookupStats, PollingSchedulerAdapter, Role, SchedulerOptions};
use kvring_rig::wire::Handle;
use std::sync::Arc;

/// A scheduler of one namespace.
pub struct SchedulerSide {
    api: PollingSchedulerAdapter,
    client: Arc<Client>,
}

impl SchedulerSide {
    /// A client and an adapter on it, attached or not.
    pub fn start(spec: &SchedulerSpec) -> SchedulerSide {
        let client = client(Role::Scheduler, &spec.client);
        let api = PollingSchedulerAdapter::new(&client, SchedulerOptions::new(spec.fingerprint()));
        SchedulerSide { api, client }
    }

    /// The same, and waits until it is attached.
    pub fn started(spec: &SchedulerSpec) -> SchedulerSide {
        let scheduler = SchedulerSide::start(spec);
        scheduler.ready();
        scheduler
    }

    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Waits until it is attached.
    pub fn ready(&self) {
        self.client.wait_ready(LIMIT).expect("a scheduler that is attached");
    }

    /// The adapter itself.
    pub fn api(&mut self) -> &mut PollingSchedulerAdapter {
        &mut self.api
    }

    /// Looks up.
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Found {
        self.try_lookup(request, admission, keys).expect("a lookup of this process's own")
    }

    /// The same in what may be a forked child.
    pub fn try_lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<Found, CallError> {
        let hit = self.api.lookup(request, admission, keys)?;
        Ok(Found { chunks: hit.chunks, handles: hit.handles().zip(keys).map(Handle::from).collect() })
    }

    /// Looks these chunks up, all of which are found.
    #[track_caller]
    pub fn finds(&mut self, request: &str, admission: u32, keys: &[Key]) -> Found {
        let found = self.lookup(request, admission, keys);
        assert_eq!(found.chunks as usize, keys.len(), "found for {request}");
        found
    }

    /// Ends these sessions.
    pub fn ends(&mut self, requests: &[&str]) {
        requests.iter().for_each(|request| self.api.end_session(request));
    }

    /// How its lookups have ended so far.
    pub fn tally(&self) -> LookupStats {
        self.api.lookup_stats()
    }
}
