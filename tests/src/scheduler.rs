//! A scheduler as a test sees it: either adapter, behind one face.

use crate::proto::{Found, Handle, SchedulerSpec, Tally};
use crate::wait::until;
use crate::worker::client;
use kvring_adapter::{
    CallError, Client, Hit, Key, Lookup, PollingSchedulerAdapter, Role, SchedulerAdapter, SchedulerApi,
    SchedulerOptions,
};
use std::sync::Arc;
use std::time::Duration;

/// A scheduler of one namespace.
pub struct SchedulerSide {
    api: Box<dyn SchedulerApi + Send>,
    client: Arc<Client>,
    world: u32,
}

impl SchedulerSide {
    /// A client and an adapter on it.
    #[must_use]
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
        SchedulerSide { api, client, world: spec.world }
    }

    /// The client behind it.
    #[must_use]
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// The adapter itself.
    pub fn api(&mut self) -> &mut dyn SchedulerApi {
        &mut *self.api
    }

    /// Looks up and waits for the answer.
    ///
    /// # Errors
    /// The adapter's.
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<Found, CallError> {
        self.api.submit_lookup(request, admission, keys)?;
        Ok(until(format_args!("the lookup of {request} is answered"), || self.check(request)))
    }

    /// The answer as it stands; `None` while it is pending.
    pub fn check(&mut self, request: &str) -> Option<Found> {
        match self.api.check_lookup(request) {
            Lookup::Hit(hit) => Some(found(hit, self.world)),
            Lookup::Pending => None,
        }
    }

    /// What lookups have come to.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let stats = self.api.lookup_stats();
        Tally {
            answered: stats.answered,
            degraded: stats.degraded,
            timed_out: stats.timed_out,
            refused: stats.refused,
        }
    }
}

fn found(hit: &Hit, world: u32) -> Found {
    let of_rank = |rank| hit.shards_of(rank).map(Handle::from).collect();
    Found { chunks: hit.chunks, ranks: (0..world).map(of_rank).collect() }
}
