//! What a client counts: changes of its engine's health, and what followed from them.

use crate::health::Health;
use kvring_shm_abi::sync::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident $help:literal;)+) => {
        /// Counts since the client was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct ClientStats {
            $(#[doc = $help] pub $name: u64,)+
        }

        impl ClientStats {
            /// Each count with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }
        }

        /// The counts themselves. Relaxed throughout, because nothing but people reads them.
        #[derive(Debug)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)+
        }

        impl Default for Counters {
            fn default() -> Counters {
                Counters { $($name: Counter(AtomicU64::new(0)),)+ }
            }
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> ClientStats {
                ClientStats { $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    attachments "Attachments to an engine, the first one included.";
    reattachments "Of those: to a successor that had taken the same arena over.";
    deaths "Times the engine was found dead.";
    restarts "Times the engine was found restarted, or recovering.";
    stalls "Times the engine's beat stood still for too long.";
    refusals "Times an engine refused this client, or was of another build.";
    slots_declared "Slots that were being written, and that a successor knew to be ours.";
    slots_lost "Slots that were being written, and that a successor did not know any more.";
    leases_declared "Leases that a successor holds for us again, in full.";
    leases_cut "Leases of which a successor held less than was leased: those loads may fail.";
    late_commits "Shards whose copy outlived the engine, and that a successor committed.";
    late_commits_gone "Shards whose copy outlived the engine, and that a successor did not want.";
    late_grants "Slots granted by an engine whose successor had been told what we hold: not used.";
}

/// One count.
#[derive(Debug)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// Counts a change of health to `to`.
    pub(crate) fn transition(&self, to: &Health) {
        match to {
            Health::Healthy => self.attachments.add(1),
            Health::Dead => self.deaths.add(1),
            Health::Attaching | Health::Recovering => self.restarts.add(1),
            Health::Stalled => self.stalls.add(1),
            Health::Refused(_) | Health::Incompatible(_) => self.refusals.add(1),
            Health::Absent | Health::Unhealthy | Health::ShutDown => {}
        }
    }
}
