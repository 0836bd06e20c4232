//! A scheduler as a test sees it, with either adapter.

use crate::proto::{Found, SchedulerSpec};
use crate::wait::{LIMIT, until};
use crate::worker::client;
use kvring_adapter::{
    CallError, Client, Key, Lookup, LookupStats, PollingSchedulerAdapter, Role, SchedulerAdapter,
    SchedulerApi, SchedulerOptions,
};
use kvring_rig::wire::Handle;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// A scheduler of one namespace.
pub struct SchedulerSide {
    api: Box<dyn SchedulerApi + Send>,
    client: Arc<Client>,
    /// The keys that were last looked up for each request.
    asked: HashMap<String, Vec<Key>>,
}

impl SchedulerSide {
    /// A client and an adapter on it, attached or not.
    pub fn start(spec: &SchedulerSpec) -> SchedulerSide {
        let client = client(Role::Scheduler, &spec.client);
        let mut options = SchedulerOptions::new(spec.fingerprint());
        options.lookup_timeout = Duration::from_millis(spec.lookup_ms);
        options.pending_timeout = Duration::from_millis(spec.pending_ms);
        let api: Box<dyn SchedulerApi + Send> = if spec.polling {
            Box::new(PollingSchedulerAdapter::new(&client, options))
        } else {
            Box::new(SchedulerAdapter::new(&client, options))
        };
        SchedulerSide { api, client, asked: HashMap::new() }
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
    pub fn api(&mut self) -> &mut dyn SchedulerApi {
        &mut *self.api
    }

    /// Looks up and waits for the answer.
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Found {
        self.try_lookup(request, admission, keys).expect("a lookup within the limits")
    }

    /// The same where the lookup may be refused.
    pub fn try_lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<Found, CallError> {
        self.submit(request, admission, keys)?;
        Ok(until(format_args!("the lookup of {request} is answered"), || self.check(request)))
    }

    /// Begins a lookup.
    pub fn submit(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<(), CallError> {
        self.api.submit_lookup(request, admission, keys)?;
        self.asked.insert(request.to_owned(), keys.to_vec());
        Ok(())
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

    /// The answer as it stands; `None` while it is pending.
    pub fn check(&mut self, request: &str) -> Option<Found> {
        let Lookup::Hit(hit) = self.api.check_lookup(request) else { return None };
        let keys = self.asked.get(request).map(Vec::as_slice).unwrap_or_default();
        Some(Found { chunks: hit.chunks, handles: hit.handles().zip(keys).map(Handle::from).collect() })
    }

    /// How its lookups have ended so far.
    pub fn tally(&self) -> LookupStats {
        self.api.lookup_stats()
    }
}
