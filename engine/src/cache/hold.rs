//! Holds: a scheduler has found chunks by itself, and says that it holds them. The cache pins them.

use super::error::HoldError;
use super::{Cache, NamespaceId, OWNERS, Owner, SlotTable};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::namespace::namespace_index;

/// A message about chunks that a client holds, and how far it has been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The client.
    pub owner: Owner,
    /// Its session.
    pub session: u64,
    /// Which of the session's admissions.
    pub admission: u32,
    /// The namespace of the chunks.
    pub namespace: NamespaceId,
    /// How many chunks of the lease come before those of this message. What the lease has beyond them is unpinned.
    pub first: u32,
    /// How many chunks the message names.
    pub count: u32,
    /// How many of them have been pinned so far.
    pub held: u32,
    /// The lease had some of them before, so this is not an access.
    again: bool,
    /// Logical time of the access to the first chunk; each further chunk is accessed one tick earlier.
    time: u64,
}

/// How a piece of a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// All chunks of the piece are pinned.
    All,
    /// What is allowed is spent: the hold goes on behind the last chunk that was pinned.
    Later,
    /// The chunk behind the last pinned one is not there any more, or there is no room to pin it: the hold is over.
    Cut,
}

impl Hold {
    /// A hold of `count` chunks, of which nothing has been done.
    #[must_use]
    pub fn new(
        owner: Owner,
        session: u64,
        admission: u32,
        namespace: NamespaceId,
        first: u32,
        count: u32,
    ) -> Hold {
        Hold { owner, session, admission, namespace, first, count, held: 0, again: false, time: 0 }
    }
}

impl<T: SlotTable> Cache<T> {
    /// Pins the next chunks of a hold, `words`, up to the first that is not there or cannot be pinned, or until what is
    /// allowed is spent.
    ///
    /// # Errors
    ///
    /// The namespace is unknown; there is no such client; or the lease has fewer chunks than `first` says. Nothing is
    /// changed then.
    pub fn hold_piece(
        &mut self,
        hold: &mut Hold,
        words: impl IntoIterator<Item = ChunkWord>,
    ) -> Result<Held, HoldError> {
        self.change();
        let Hold { owner, session, admission, namespace, first, .. } = *hold;
        if usize::from(owner) >= OWNERS {
            return Err(HoldError::NoSuchOwner { owner });
        }
        let Some(registered) = self.namespace(namespace) else {
            return Err(HoldError::UnknownNamespace { namespace });
        };
        let (chunk_bytes, index) = (registered.chunk_bytes, namespace_index(namespace));
        let (mut lease, mut admissions) = self.leases.find(owner, session, admission);
        let len = lease.map_or(0, |lease| self.leases.get(lease).len);
        if len < first.saturating_add(hold.held) {
            return Err(HoldError::Gap { first, len });
        }
        if hold.held == 0 {
            hold.again |= len > first;
            if let Some(id) = lease.filter(|_| len > first) {
                if !self.truncate(id, first) {
                    return Ok(Held::Later);
                }
                if first == 0 {
                    // The lease has ended with its first chunk, and may begin anew.
                    lease = None;
                    admissions -= 1;
                }
            }
        }
        let mut front = lease.and_then(|lease| self.leases.last(lease));
        if hold.held == 0 && !hold.again {
            // A long chain is held by several messages, the head first: each goes on in time where the one before it ended.
            let before = front.filter(|_| first > 0).map(|front| self.chunks.get(front).tick);
            hold.time = before.map_or_else(|| self.next_tick(hold.count), |tick| tick.saturating_sub(1));
        }
        if let Some(registered) = self.namespace_mut(namespace) {
            registered.used = registered.used.max(hold.time);
        }
        for word in words {
            if self.is_spent() {
                return Ok(Held::Later);
            }
            self.work += 1;
            let id = word.chunk();
            let is_there = self.chunks.visible(id).is_some_and(|(other, _)| other == index)
                && self.table.chunks().word(id) == Some(word);
            let costs = is_there && !self.chunks.get(id).pins.any();
            let is_room = self.leases.room(owner, lease, admissions) > 0
                && (!costs || self.charges.room(owner) >= chunk_bytes);
            if !is_there || !is_room {
                return Ok(Held::Cut);
            }
            self.spare(id);
            let to_come = u64::from(hold.count.saturating_sub(hold.held + 1));
            self.pin(id, owner, to_come);
            match lease {
                Some(lease) => self.leases.push(lease, id),
                None => lease = Some(self.leases.create(owner, session, admission, id)),
            }
            if !hold.again {
                self.touch(id, hold.time.saturating_sub(u64::from(hold.held)), front);
            }
            front = Some(id);
            hold.held += 1;
        }
        Ok(Held::All)
    }

    fn next_tick(&mut self, chunks: u32) -> u64 {
        self.tick += u64::from(chunks);
        self.tick
    }

    /// How much the leases of one client may hold. There is room for as much from each client.
    #[must_use]
    pub fn share(&self) -> kvring_shm_abi::engine_segment::ClientShare {
        kvring_shm_abi::engine_segment::ClientShare {
            bytes: self.config.client_bytes_max,
            pins: self.config.pins_max,
            leases: self.config.leases_max,
        }
    }
}
