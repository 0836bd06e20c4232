//! Registrations: the founding of namespaces, and the forgetting of those that nobody uses where the tables have no room.

use super::Service;
use super::entry::Entry;
use super::registry::{Nonsense, Shape};
use crate::cache::RegisterError;
use crate::stats::Stat;
use kvring_shm_abi::engine_segment::{NAMESPACES_MAX, RANKS_MAX};
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{Disagreement, Record, Registration, Status};
use kvring_shm_abi::namespace::namespace_index;

/// Places of the table of namespaces that are kept free for new ones.
const SPARE: usize = 8;
/// What a registration costs, in records of the cache: it looks through the tables of namespaces and of sizes, and is logged.
const RECORDS: u64 = 512;
/// Shard sizes that are kept free for new namespaces: one has a size for each rank, at most.
const SIZES_SPARE: usize = RANKS_MAX;

fn check(registration: &Registration) -> Result<(), Nonsense> {
    let nonsense = |what, expected, got| Err(Nonsense { what, expected, got });
    if !(1..=RANKS_MAX as u32).contains(&registration.world) {
        return nonsense("world", "1 to 64", u64::from(registration.world));
    }
    if registration.rank >= registration.world {
        return nonsense("rank", "below the world", u64::from(registration.rank));
    }
    if registration.shard_bytes == 0 {
        return nonsense("shard_bytes", "above 0", 0);
    }
    if registration.chunk_tokens == 0 {
        return nonsense("chunk_tokens", "above 0", 0);
    }
    Ok(())
}

impl Service {
    pub(super) fn register(
        &mut self,
        entry: usize,
        record: u32,
    ) -> Result<(Status, [u64; 4]), kvring_shm_abi::payload::OutOfArea> {
        let Some(connection) = self.entries[entry].connection() else { return Ok((Status::Ok, [0; 4])) };
        if connection.role != Role::Worker {
            return Ok((Status::WrongRole, [0; 4]));
        }
        let mut words = [0u64; Registration::WORDS];
        connection.payload().read(record, &mut words)?;
        let registration: Registration = bytemuck::cast(words);
        if let Err(nonsense) = check(&registration) {
            self.breach(entry, &nonsense);
            return Ok((Status::Ok, [0; 4]));
        }
        Ok(self.admit(entry, &registration))
    }

    fn admit(&mut self, entry: usize, registration: &Registration) -> (Status, [u64; 4]) {
        self.cache.spend(RECORDS);
        let largest = self.registry.largest_shard;
        // The largest shard is a whole number of pages: rounding up would change nothing, and could overflow.
        if registration.shard_bytes > largest {
            return (Status::ShardTooLarge, [largest, 0, 0, 0]);
        }
        let known = self.registry.find(&registration.fingerprint);
        let is_new = known.is_none();
        let Some(index) = known.or_else(|| self.found_namespace(registration)) else {
            return (Status::TooManyNamespaces, [0; 4]);
        };
        let Some(known) = &self.registry.namespaces[index] else {
            return (Status::TooManyNamespaces, [0; 4]);
        };
        let id = known.id;
        let rank = registration.rank as usize;
        let differ = |what: Disagreement, expected: u64, got: u64| {
            (Status::Disagreement, [what as u64, expected, got, 0])
        };
        let Shape { world, chunk_tokens } = known.shape;
        if world != registration.world {
            return differ(Disagreement::World, world.into(), registration.world.into());
        }
        if chunk_tokens != registration.chunk_tokens {
            return differ(Disagreement::ChunkTokens, chunk_tokens.into(), registration.chunk_tokens.into());
        }
        match known.ranks[rank] {
            Some((layout, _)) if layout != registration.layout => {
                return differ(Disagreement::Layout, layout, registration.layout);
            }
            Some((_, bytes)) if bytes != registration.shard_bytes => {
                return differ(Disagreement::ShardBytes, bytes, registration.shard_bytes);
            }
            Some(_) => {}
            None => {
                let (layout, bytes) = (registration.layout, registration.shard_bytes);
                if let Err(error) = self.register_rank(id, registration) {
                    tracing::error!(%error, "a registration is refused");
                    if is_new {
                        self.end_namespace(index);
                    }
                    return match error {
                        RegisterError::TooManySizes { most, .. } => {
                            (Status::TooManySizes, [most.into(), 0, 0, 0])
                        }
                        // Everything else was compared above with what the registry knows, and the cache knows the same.
                        _ => (Status::Busy, [0; 4]),
                    };
                }
                if let Some(known) = &mut self.registry.namespaces[index] {
                    known.ranks[rank] = Some((layout, bytes));
                }
                failpoint::here(Place::RankRegistered);
                self.segments.engine.namespaces[index].set_rank(rank, layout, bytes);
                failpoint::here(Place::RankPublished);
            }
        }
        self.cache.use_namespace(id);
        if let Some(connection) = self.entries[entry].connection_mut() {
            connection.set_rank(id, registration.rank);
        }
        self.make_room();
        self.stat(Stat::Registrations, 1);
        (Status::Ok, [id.into(), 0, 0, 0])
    }

    fn is_used(&self, namespace: u32) -> bool {
        let mut connections = self.entries.iter().filter_map(Entry::connection);
        connections.any(|connection| connection.rank_in(namespace).is_some())
    }

    /// Gives a rank its shard size. Where there are too many sizes, forgets namespaces that nobody uses and that hold nothing.
    fn register_rank(&mut self, id: u32, registration: &Registration) -> Result<(), RegisterError> {
        let Registration { world, rank, shard_bytes, .. } = *registration;
        loop {
            match self.cache.register(id, world, rank, shard_bytes) {
                Err(RegisterError::TooManySizes { .. }) if self.forget_an_empty_one(Some(id)).is_some() => {}
                other => return other,
            }
        }
    }

    /// Each change of a model's weights or of vLLM's version makes a namespace, so the tables of namespaces and of shard sizes
    /// fill up over the months. Before one is full, the least recently used of the namespaces that nobody uses is cleared and
    /// forgotten, in the background. Not while clients of the earlier engine are awaited: one that has not come back yet may
    /// use it.
    fn make_room(&mut self) {
        let (sizes, sizes_max) = self.cache.sizes();
        let is_room = self.registry.len() + SPARE <= NAMESPACES_MAX && sizes + SIZES_SPARE <= sizes_max;
        if is_room || self.is_awaiting() {
            return;
        }
        let known = self.registry.namespaces.iter().flatten().map(|known| known.id);
        let unused = known.filter(|id| !self.is_used(*id));
        if let Some(id) = unused.min_by_key(|id| self.cache.used(*id)) {
            self.begin_retiring(id);
        }
    }

    /// Forgets one namespace, other than `but`, that nobody uses and that holds nothing, and returns its index.
    fn forget_an_empty_one(&mut self, but: Option<u32>) -> Option<usize> {
        if self.is_awaiting() {
            return None;
        }
        let index = (0..NAMESPACES_MAX).find(|index| {
            let id =
                self.registry.namespaces[*index].as_ref().map(|known| known.id).filter(|id| Some(*id) != but);
            id.is_some_and(|id| !self.is_used(id) && self.cache.forget(id))
        })?;
        self.end_namespace(index);
        Some(index)
    }

    /// Takes a namespace out of the registry and the engine's segment: clients no longer find it.
    fn end_namespace(&mut self, index: usize) {
        self.segments.engine.namespaces[index].end();
        failpoint::here(Place::NamespaceEnded);
        self.registry.namespaces[index] = None;
    }

    /// Forgets a namespace that was cleared for that, unless a client uses it by now or has leased some of it.
    pub(super) fn retire(&mut self, namespace: Option<u32>, dropped: u64) {
        let Some(id) = namespace else { return };
        let is_there = self.registry.get(id).is_some();
        if is_there && !self.is_used(id) && self.cache.forget(id) {
            self.end_namespace(usize::from(namespace_index(id)));
            tracing::info!(
                namespace = id,
                dropped,
                "namespace forgotten: nobody uses it, and the table of namespaces, or of shard sizes, is nearly full"
            );
        }
    }

    /// Founds a namespace in a free place, or in that of a namespace that nobody uses and that holds nothing, and returns its
    /// index.
    fn found_namespace(&mut self, registration: &Registration) -> Option<usize> {
        let free = self.registry.namespaces.iter().position(Option::is_none);
        let index = free.or_else(|| self.forget_an_empty_one(None))?;
        // Ends what lies in that place, also a namespace that is only half made.
        self.end_namespace(index);
        let id = self.segments.engine.namespaces[index].begin(index as u8, registration);
        failpoint::here(Place::NamespaceBegun);
        let Registration { fingerprint, world, chunk_tokens, .. } = *registration;
        self.registry.found(id, fingerprint, Shape { world, chunk_tokens }, [None; RANKS_MAX]);
        let model = String::from_utf8_lossy(&registration.model).trim_end_matches('\0').to_owned();
        tracing::info!(
            namespace = id,
            model,
            world = registration.world,
            shard_bytes = registration.shard_bytes,
            chunk_tokens = registration.chunk_tokens,
            "namespace registered"
        );
        Some(index)
    }
}
