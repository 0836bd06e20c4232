//! Warm recovery: what a dead predecessor left in the engine's segment becomes the cache of its successor.
//!
//! Recovery runs on the service thread, between the odd incarnation and the even one, and only reads, except that it
//! frees slots, ends records of chunks that are not whole, and shows chunks whose engine died just before it would have.
//! Committed shards stay: complete chunks are visible, incomplete ones go on forming. Slots that the dead were writing
//! are freed, and their rounds are dropped.
//!
//! A slot that a *living* client was writing stays that client's, whether its chunk stays or not: only the client's
//! commit or abort, or its death, frees it. The same holds for a slot of a dead client for which a device may still
//! write. All of this is derived from the chunk records, the slab table and the slot headers. Each of their transitions was published
//! in one store, so a predecessor's death between any two of its stores leaves tables that make sense. Tables that
//! do not make sense are an error, and lead to a cold start.

use crate::cache::{Cache, Found, NotRestorable, RegisterError, Round, Shard, ShardHeader};
use crate::segments::Segments;
use crate::service::{Placing, Registry, SharedSlots};
use crate::stats::Stat;
use kvring_shm_abi::failpoint::{self, Place, Rule};
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::CLIENTS_MAX;
use kvring_shm_abi::message;
use kvring_shm_abi::slot::{SlotContent, SlotState};
use std::time::Instant;

/// How many slots ahead a slot's chunk is prefetched.
const AHEAD: u32 = 8;

/// Why a predecessor's cache cannot be recovered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotRecoverable {
    /// The slab table or a slot header is wrong, or there is no memory.
    #[error(transparent)]
    Tables(#[from] NotRestorable),
    /// A namespace is wrong.
    #[error("namespace {id}: {why}")]
    Namespace {
        /// Its id.
        id: u32,
        /// What is wrong with it.
        why: String,
    },
}

/// The clients of a predecessor that live. They come back by themselves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited {
    /// The nonce in each entry at that time. It is of an attachment to the predecessor, so this engine does not
    /// answer it.
    pub(crate) nonces: [Option<u64>; CLIENTS_MAX],
    /// One bit for each entry whose owner lives.
    pub(crate) living: u64,
}

impl Inherited {
    /// No clients.
    pub(crate) fn nobody() -> Inherited {
        Inherited { nonces: [None; CLIENTS_MAX], living: 0 }
    }
}

/// Reads everything back into an empty cache. Its usable slabs have been added before.
pub(crate) fn recover(
    segments: &Segments,
    cache: &mut Cache<SharedSlots>,
    registry: &mut Registry,
) -> Result<(Inherited, Placing), NotRecoverable> {
    let began = Instant::now();
    namespaces(segments, cache, registry)?;
    cache.restore_chunks()?;
    failpoint::here(Place::RecoveryRecords);
    let mut shards = 0u64;
    for (first, record) in (0u32..).zip(segments.engine.slabs.iter()) {
        let Some((slot_bytes, slabs)) = record.get() else { continue };
        cache.restore_span(first, slabs, slot_bytes)?;
        let slots = cache.slots_of_span(first);
        for slot in slots.clone() {
            // This cannot happen: a span lies inside the arena, and the table has a header for each of its slots.
            let Some(header) = segments.engine.slot(slot) else { break };
            cache.restore_soon(slot.saturating_add(AHEAD));
            if let Some(shard) = shard(&header.read()) {
                cache.restore(slot, &shard)?;
                shards += 1;
            }
        }
        failpoint::here(Place::RecoverySpan);
    }
    let (restored, unplaced) = cache.restore_end();
    let placing = Placing::begin(unplaced, cache);
    failpoint::here(Place::RecoveryChunks);
    let inherited = owners(segments, cache);
    failpoint::here(Place::RecoveryOwners);
    let stats = cache.stats();
    let block = &segments.engine.stats;
    // Forming chunks that had a dead writer have been dropped by now.
    let kept = stats.chunks_forming;
    let lost = u64::from(restored.dropped) + u64::from(restored.kept).saturating_sub(kept);
    for (stat, value) in [
        (Stat::WarmStart, 1),
        (Stat::ChunksRecovered, stats.chunks_visible),
        (Stat::ChunksKept, kept),
        (Stat::ChunksLost, lost),
        (Stat::SlotsQuarantined, stats.slots_writing),
    ] {
        stat.of(block).set(value);
    }
    tracing::info!(
        name = %segments.name(), recovered = stats.chunks_visible, kept, lost, quarantined = stats.slots_writing,
        clients = inherited.living.count_ones(), shards, ms = began.elapsed().as_millis() as u64,
        "recovered what the earlier engine held"
    );
    Ok((inherited, placing))
}

fn namespaces(
    segments: &Segments,
    cache: &mut Cache<SharedSlots>,
    registry: &mut Registry,
) -> Result<(), NotRecoverable> {
    for (index, namespace) in (0u8..).zip(segments.engine.namespaces.iter()) {
        let Some(info) = namespace.read(index) else { continue };
        let id = info.id;
        let wrong = |why: String| NotRecoverable::Namespace { id, why };
        registry.restore(namespace, &info).map_err(|error| wrong(error.to_string()))?;
        for rank in 0..info.world {
            let Some((_, bytes)) = namespace.rank_layout(rank as usize) else { continue };
            let registered = cache.register(id, info.world, rank, bytes);
            registered.map_err(|error: RegisterError| wrong(error.to_string()))?;
        }
    }
    Ok(())
}

/// The content of a slot in use; `None` for a free one.
fn shard(content: &SlotContent) -> Option<Shard> {
    let found = match content.word.state {
        SlotState::Free => return None,
        SlotState::Writing => Found::Writing,
        SlotState::Orphaned => Found::Orphaned,
        SlotState::Committed if content.hidden => Found::Hidden,
        SlotState::Committed => Found::Committed,
    };
    let message::Round { source, number } = message::Round::unpack(content.round);
    let identity = content.identity;
    let header = ShardHeader {
        owner: content.word.owner,
        nonce: content.nonce,
        key: identity.key,
        namespace: identity.namespace,
        rank: identity.rank,
        round: if failpoint::broken(Rule::Rounds) { Round::default() } else { Round { source, number } },
        offset: identity.offset,
        length: identity.length,
    };
    Some(Shard { header, generation: content.word.generation, found, tick: content.last_touch })
}

/// Finds out which clients live. Frees what the others were writing, and drops their rounds.
fn owners(segments: &Segments, cache: &mut Cache<SharedSlots>) -> Inherited {
    let mut inherited = Inherited::nobody();
    // This marks clients that died while there was no engine and whose kernel marks no words.
    segments.mark_dead_clients();
    let lobby = &segments.lobby;
    for entry in 0..CLIENTS_MAX {
        let lives = matches!(lobby.life_words[entry].life(), Life::Alive { .. });
        if lives && !failpoint::broken(Rule::Quarantine) {
            inherited.living |= 1 << entry;
            inherited.nonces[entry] = lobby.entries[entry].read_nonce();
        } else if lobby.entries[entry].dma().is_some() {
            // A device may still be writing for this client, whatever its life word says. The service's first look
            // finds out, and frees its slots or waits.
            cache.owner_lingers(entry as u8);
        } else {
            cache.owner_gone(entry as u8);
        }
    }
    inherited
}
