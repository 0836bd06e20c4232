//! One attached client, as the engine sees it: its channel's ends and what it may do.

use super::dispatch::Doing;
use kvring_shm_abi::channel::{Channel, ChannelError};
use kvring_shm_abi::engine_segment::NAMESPACES_MAX;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{Completion, Ident};
use kvring_shm_abi::namespace::namespace_index;
use kvring_shm_abi::park;
use kvring_shm_abi::payload::Payload;
use kvring_shm_abi::ring::{Body, Consumer, Producer, RingJump};
use kvring_shm_abi::segment::EngineName;

/// The longest time between two looks at a client that counts as such.
const GAP_MAX_NS: u64 = 100_000_000;

pub(super) struct Connection {
    channel: Channel,
    submissions: Consumer,
    completions: Producer,
    pub(super) role: Role,
    pub(super) nonce: u64,
    pub(super) ident: Ident,
    pub(super) name: String,
    /// The namespaces that this client has registered, by index: the id, and the client's rank.
    ranks: [Option<(u32, u32)>; NAMESPACES_MAX],
    /// The request that is under way.
    pub(super) doing: Option<Doing>,
    /// A completion was pushed since the last [`Self::announce`].
    unannounced: bool,
    /// For how long the client has held something that it could not publish, and when that was looked at last.
    unpublished_ns: u64,
    unpublished_looked_ns: u64,
    /// It has said so for too long.
    is_doubted: bool,
}

/// A lobby entry's claim, checked.
pub(super) struct Claim {
    pub(super) entry: usize,
    pub(super) role: Role,
    pub(super) nonce: u64,
    pub(super) incarnation: u32,
    pub(super) payload_words: u32,
    pub(super) name: String,
}

impl Connection {
    pub(super) fn open(engine: &EngineName, claim: Claim) -> Result<Connection, ChannelError> {
        let channel = Channel::open(engine, claim.entry, claim.nonce, claim.payload_words)?;
        Ok(Connection {
            submissions: Consumer::new(channel.submissions.clone()),
            completions: Producer::new(channel.completions.clone()),
            channel,
            role: claim.role,
            nonce: claim.nonce,
            ident: Ident { incarnation: claim.incarnation, nonce: claim.nonce as u32 },
            name: claim.name,
            ranks: [None; NAMESPACES_MAX],
            doing: None,
            unannounced: false,
            unpublished_ns: 0,
            unpublished_looked_ns: 0,
            is_doubted: false,
        })
    }

    #[inline]
    pub(super) fn pop(&mut self) -> Result<Option<Body>, RingJump> {
        self.submissions.pop()
    }

    /// Is there something to do for this client?
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        self.doing.is_some() || self.submissions.has_news()
    }

    /// Does this scheduler hold something that it could not publish?
    #[inline]
    pub(super) fn has_unpublished(&self) -> bool {
        !self.is_doubted && self.channel.unpublished().is_set()
    }

    /// Takes in a look at what it says of that. True when it has said so for longer than `grace_ns`, once.
    pub(super) fn doubts_unpublished(&mut self, now_ns: u64, grace_ns: u64) -> bool {
        let gap = now_ns.saturating_sub(core::mem::replace(&mut self.unpublished_looked_ns, now_ns));
        if !self.channel.unpublished().is_set() {
            // Whoever says so now and then, again and again, is not believed each time anew.
            self.unpublished_ns = self.unpublished_ns.saturating_sub(gap);
            self.is_doubted &= self.unpublished_ns > 0;
            return false;
        }
        // After a longer gap it was this engine that stood still.
        self.unpublished_ns += gap.min(GAP_MAX_NS);
        let doubted_before = self.is_doubted;
        self.is_doubted |= self.unpublished_ns > grace_ns;
        self.is_doubted && !doubted_before
    }

    pub(super) fn payload(&self) -> &Payload {
        &self.channel.payload
    }

    /// Publishes a completion. The client is woken by `announce`.
    #[inline]
    pub(super) fn push(&mut self, completion: &Completion) {
        self.completions.push(&completion.encode());
        self.unannounced = true;
    }

    /// Wakes the client if a completion was pushed and it sleeps. Returns true when that took a system call.
    #[inline]
    pub(super) fn announce(&mut self) -> bool {
        core::mem::take(&mut self.unannounced) && park::notify(self.channel.client_parked())
    }

    /// The rank under which this client registered a namespace. The engine keeps the namespace as long as there is one.
    pub(super) fn rank_in(&self, namespace: u32) -> Option<u32> {
        let (id, rank) = (*self.ranks.get(usize::from(namespace_index(namespace)))?)?;
        (id == namespace).then_some(rank)
    }

    pub(super) fn set_rank(&mut self, namespace: u32, rank: u32) {
        if let Some(place) = self.ranks.get_mut(usize::from(namespace_index(namespace))) {
            *place = Some((namespace, rank));
        }
    }

    pub(super) fn forget_rank(&mut self, namespace: u32) -> bool {
        let is_known = self.rank_in(namespace).is_some();
        if is_known {
            self.ranks[usize::from(namespace_index(namespace))] = None;
        }
        is_known
    }
}
