//! The cache's self-check, a few entries at a time: do tables that name each other agree, and are the sums right?

use super::chunk::Life;
use super::lease::Leases;
use super::slot::State;
use super::{Cache, InvariantBroken, NAMESPACES, SlotId, SlotTable};
use crate::policy::ChunkId;
use kvring_shm_abi::lookup;

/// How many chunks of a lease are checked together.
const LEASE_PART: u32 = 16;

/// How far the step-by-step check has come.
#[derive(Clone, Copy, Default)]
pub(super) struct Check {
    phase: Phase,
    /// The entry and, of a lease, the chunk.
    at: (u32, u32),
    sums: Sums,
    /// The value of `Cache::version` when this pass over the tables began.
    version: u64,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Slots,
    Chunks,
    Leases,
}

/// What one pass over the tables has counted.
#[derive(Clone, Copy, Default)]
struct Sums {
    free: u64,
    writing: u64,
    orphans: u64,
    committed: u64,
    visible: u64,
    forming: u64,
    hidden: u64,
    marked: u64,
    chunk_pins: u64,
    leases: u64,
    lease_pins: u64,
    blocks: u64,
}

impl<T: SlotTable> Cache<T> {
    /// Checks `budget` more entries of the tables. Each entry is compared with those that it names at once; the
    /// sums are compared only if nothing has changed between the first entry and the last.
    ///
    /// # Errors
    ///
    /// What is wrong. The engine must stop serving then.
    pub fn check_step(&mut self, budget: u32) -> Result<(), InvariantBroken> {
        let mut check = self.check;
        let mut left = budget;
        while left > 0 {
            // A chunk counts as one entry more than it has ranks.
            let cost = match check.phase {
                Phase::Slots => 1,
                Phase::Chunks if check.at.0 < self.chunks.fresh => 1 + self.world_of(check.at.0),
                Phase::Chunks => 1,
                Phase::Leases if check.at.0 < self.leases.fresh() => {
                    LEASE_PART + self.leases.steps_to(check.at.0, check.at.1)
                }
                Phase::Leases => 1,
            };
            left = left.saturating_sub(cost);
            if check.phase == Phase::Slots && check.at.0 == 0 {
                check = Check { version: self.version, ..Check::default() };
            }
            let next = self.check_entry(check.phase, check.at, &mut check.sums)?;
            if let Some(at) = next {
                check.at = at;
                continue;
            }
            check.at = (0, 0);
            check.phase = match check.phase {
                Phase::Slots => Phase::Chunks,
                Phase::Chunks => Phase::Leases,
                Phase::Leases => {
                    if check.version == self.version {
                        self.check_sums(&check.sums)?;
                    }
                    Phase::Slots
                }
            };
        }
        self.check = check;
        Ok(())
    }

    /// Checks everything. For tests: O(everything), and it allocates.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn check_all(&self) -> Result<(), InvariantBroken> {
        let mut sums = Sums::default();
        for phase in [Phase::Slots, Phase::Chunks, Phase::Leases] {
            let mut at = Some((0, 0));
            while let Some(entry) = at {
                at = self.check_entry(phase, entry, &mut sums)?;
            }
        }
        self.check_sums(&sums)?;
        self.check_spans()?;
        self.check_clients()?;
        self.check_namespaces()
    }

    /// Checks one entry, or some of a lease's chunks. Returns the next one of the phase.
    fn check_entry(
        &self,
        phase: Phase,
        (at, chunk): (u32, u32),
        sums: &mut Sums,
    ) -> Result<Option<(u32, u32)>, InvariantBroken> {
        match phase {
            Phase::Slots => Ok(self.check_slot(at, sums)?.map(|slot| (slot, 0))),
            Phase::Chunks => {
                if at >= self.chunks.fresh {
                    return Ok(None);
                }
                self.check_chunk(at, sums)?;
                Ok(Some((at + 1, 0)))
            }
            Phase::Leases => {
                if at >= self.leases.fresh() {
                    return Ok(None);
                }
                // If the lease has changed since its first chunks were checked, the sums are not compared.
                let len = self.leases.get(at).len;
                if chunk == 0 {
                    sums.leases += u64::from(len > 0);
                    sums.lease_pins += u64::from(len);
                    sums.blocks += Leases::blocks_of(len);
                }
                for id in self.leases.chunks(at, chunk).take(LEASE_PART as usize) {
                    let chunk = self.chunks.get(id);
                    let may_be_leased = matches!(chunk.life(), Life::Visible | Life::Hidden);
                    link("leases and chunks", may_be_leased && chunk.pins.any(), at, id)?;
                }
                let next = chunk + LEASE_PART;
                Ok(Some(if next < len { (at, next) } else { (at + 1, 0) }))
            }
        }
    }

    fn check_slot(&self, at: SlotId, sums: &mut Sums) -> Result<Option<SlotId>, InvariantBroken> {
        let slab = at / self.slabs.first_slot(1);
        // Slots of the smallest size fill the table up to its last id, behind which there is no slab.
        if slab >= self.slabs.count() {
            return Ok(None);
        }
        let after = |slab| (slab < self.slabs.count()).then(|| self.slabs.first_slot(slab));
        let Some(head) = self.slabs.head_of_slab(slab) else { return Ok(after(slab + 1)) };
        let span = self.slabs.span(head);
        let first = self.slabs.first_slot(head);
        if at - first >= span.fresh {
            sums.free += u64::from(span.slots - span.fresh);
            return Ok(after(head + span.len));
        }
        let slot = self.slots.get(at);
        match slot.state() {
            State::Free => sums.free += 1,
            State::Writing => sums.writing += 1,
            State::Committed => sums.committed += 1,
        }
        match (slot.chunk(), slot.state()) {
            (Some(id), State::Writing | State::Committed) => {
                let is_known = id < self.chunks.fresh && self.chunks.get(id).life() != Life::Free;
                link("slots and chunks", is_known, at, id)?;
                let world = self.world_of(id);
                let is_rank = u32::from(slot.rank) < world;
                let shard = if is_rank { self.chunks.shard(id, world, u32::from(slot.rank)) } else { None };
                link("slots and shards", shard == Some(at), at, id)?;
            }
            (None, State::Writing) => sums.orphans += 1,
            (None, State::Free) => {}
            (chunk, _) => link("free slots and chunks", false, at, chunk.unwrap_or(u32::MAX))?,
        }
        Ok(Some(at + 1))
    }

    fn check_chunk(&self, id: ChunkId, sums: &mut Sums) -> Result<(), InvariantBroken> {
        let chunk = self.chunks.get(id);
        match chunk.life() {
            Life::Free => {
                return link("free chunks and records", self.table.chunks().read(id).is_none(), id, id);
            }
            Life::Forming => sums.forming += 1,
            Life::Visible => sums.visible += 1,
            Life::Hidden => sums.hidden += 1,
            Life::Expected => link("chunks after a recovery", false, id, id)?,
        }
        sums.chunk_pins += u64::from(chunk.pins.count());
        let is_forming = chunk.life() == Life::Forming;
        link("chunks and index", self.index.holds(&self.chunks, id) == is_forming, id, chunk.hash)?;
        let world = self.world_of(id);
        let is_published = self.is_published(id, world)?;
        link("chunks and records", is_published == (chunk.life() == Life::Visible), id, world)?;
        let is_marked = self.marked.has(id);
        link("marks and records", is_marked == (is_published && !self.is_shown(id)), id, chunk.hash)?;
        link("marks and leases", !(is_marked && chunk.pins.any()), id, chunk.pins.count())?;
        sums.marked += u64::from(is_marked);
        let (mut writing, mut committed) = (0_u32, 0_u32);
        for rank in 0..world {
            let Some(slot) = self.chunks.shard(id, world, rank) else { continue };
            let entry = self.slots.get(slot);
            let is_own = entry.chunk() == Some(id) && u32::from(entry.rank) == rank;
            link("chunks and slots", is_own, id, slot)?;
            match entry.state() {
                State::Writing => writing += 1,
                State::Committed => committed += 1,
                State::Free => link("chunks and free slots", false, id, slot)?,
            }
        }
        count("shards being written of a chunk", writing, chunk.writing)?;
        count("shards committed of a chunk", committed, chunk.committed)?;
        match chunk.life() {
            Life::Visible => count("shards of a visible chunk", committed, world),
            Life::Hidden => {
                link("hidden chunks and leases", chunk.pins.any(), id, chunk.pins.count())?;
                count("shards of a hidden chunk", committed, world)
            }
            Life::Free | Life::Forming | Life::Expected => {
                count("pins of a forming chunk", chunk.pins.count(), 0_u32)
            }
        }
    }

    /// Whether the chunk's record says that it is visible. Then it must say what the chunk is and where its shards lie, and
    /// the directory must lead to it.
    fn is_published(&self, id: ChunkId, world: u32) -> Result<bool, InvariantBroken> {
        let (chunk, table) = (self.chunks.get(id), self.table.chunks());
        let Some(content) = table.read(id) else { return Ok(false) };
        let is_it = content.identity == self.identity(id);
        link("chunks and what their records say", is_it, id, content.identity.namespace)?;
        let is_same = |rank| self.chunks.shard(id, world, rank) == table.slot(&content, world, rank);
        link("shards and slots in records", (0..world).all(is_same), id, world)?;
        let is_found = self.visible(chunk.namespace, chunk.key) == Some(id);
        link("records and directory", is_found, id, id)?;
        Ok(true)
    }

    /// Whether lookups find the chunk of this record: it is there and not marked.
    fn is_shown(&self, id: ChunkId) -> bool {
        let table = self.table.chunks();
        table.word(id).is_some_and(|word| table.still(&[word], lookup::Marked::Missing) == 1)
    }

    fn check_sums(&self, sums: &Sums) -> Result<(), InvariantBroken> {
        let stats = self.stats();
        let slots: u64 = self.slabs.classes().iter().map(|class| class.slots).sum();
        count("slots in all", sums.free + sums.writing + sums.committed, slots)?;
        count("free slots", sums.free, stats.slots_free)?;
        count("slots being written", sums.writing, stats.slots_writing)?;
        count("committed slots", sums.committed, stats.slots_committed)?;
        count("orphans", sums.orphans, stats.orphans)?;
        count("visible chunks", sums.visible, stats.chunks_visible)?;
        count("forming chunks", sums.forming, stats.chunks_forming)?;
        count("hidden chunks", sums.hidden, stats.chunks_hidden)?;
        count("marked chunks", sums.marked, self.marked.len())?;
        count("chunks in the index", sums.forming, self.index.len)?;
        let placed: usize = (0..NAMESPACES).map(|namespace| self.policy.len(namespace)).sum();
        count("chunks in the eviction orders", placed as u64 + self.unplaced, sums.visible)?;
        count("leases", sums.leases, stats.leases)?;
        count("pins in leases", sums.lease_pins, stats.pins)?;
        count("pins of chunks", sums.chunk_pins, sums.lease_pins)?;
        count("blocks of leases", sums.blocks, self.leases.blocks_used())
    }

    /// Checks spans: their used slots, busy slots and free lists.
    fn check_spans(&self) -> Result<(), InvariantBroken> {
        let (mut pooled, mut bytes) = (0_u32, 0_u64);
        for slab in 0..self.slabs.count() {
            let head = self.slabs.head_of_slab(slab);
            pooled += u32::from(self.slabs.is_pooled(slab));
            link("slabs and the pool", !(self.slabs.is_pooled(slab) && head.is_some()), slab, slab)?;
            if head != Some(slab) {
                continue;
            }
            let (span, first) = (self.slabs.span(slab), self.slabs.first_slot(slab));
            let (mut used, mut busy) = (0_u32, 0_u32);
            for slot in first..first + span.fresh {
                let entry = self.slots.get(slot);
                let is_pinned = entry.chunk().is_some_and(|id| self.chunks.get(id).pins.any());
                used += u32::from(entry.state() != State::Free);
                busy += u32::from(entry.state() == State::Writing || is_pinned);
            }
            count("used slots of a span", used, span.used)?;
            bytes += u64::from(used) * self.slabs.class(self.slabs.class_of_span(slab)).bytes;
            count("busy slots of a span", busy, span.busy)?;
            let free = self.slabs.free_list(slab, &self.slots).count() as u32;
            count("free list of a span", free, span.fresh - used)?;
        }
        count("slabs in the pool", pooled, self.slabs.pool_len())?;
        count("bytes of slots in use", bytes, self.slabs.bytes_used)?;
        for (class, entry) in self.slabs.classes().iter().enumerate() {
            let mut free = 0_u64;
            for head in self.slabs.partial_list(class as u16) {
                let span = self.slabs.span(head);
                link(
                    "spans and classes",
                    self.slabs.class_of_span(head) == class as u16,
                    head,
                    class as u32,
                )?;
                free += u64::from(span.slots - span.used);
            }
            count("free slots in spans of a class", free, entry.free)?;
        }
        Ok(())
    }

    /// Checks clients: the lists of what they are writing, and what they are charged.
    fn check_clients(&self) -> Result<(), InvariantBroken> {
        let (mut bytes, mut unpaid, mut writing) = ([0_u64; super::OWNERS], 0_u64, 0_u64);
        for (owner, slot) in self.slots.all_writing() {
            bytes[usize::from(owner)] += self.slot_bytes(slot);
            writing += 1;
        }
        count("slots in lists of writers", writing, self.slots.counts.writing)?;
        for id in 0..self.chunks.fresh {
            let chunk = self.chunks.get(id);
            if chunk.pins.any() {
                let namespace = self.namespace_of(id);
                let charged = chunk.pins.payer().map_or(&mut unpaid, |payer| &mut bytes[usize::from(payer)]);
                *charged += namespace.map_or(0, |namespace| namespace.chunk_bytes);
            }
        }
        for (counted, recorded) in bytes.into_iter().zip(self.charges.of) {
            count("bytes of a client", counted, recorded)?;
        }
        count("bytes that nobody pays for", unpaid, self.charges.unpaid)?;
        Ok(())
    }

    /// Checks namespaces: the policy must order their visible chunks, except for restored ones that have no place
    /// yet, and the idle lists must have the forming chunks that nobody is writing.
    fn check_namespaces(&self) -> Result<(), InvariantBroken> {
        let mut unplaced = 0_u64;
        for (number, namespace) in self.namespaces.iter().enumerate() {
            let Some(namespace) = namespace else { continue };
            let (mut placed, mut pinned, mut idle) = (Vec::new(), 0_usize, 0_usize);
            for id in 0..self.chunks.fresh {
                let chunk = self.chunks.get(id);
                if usize::from(chunk.namespace) != number {
                    continue;
                }
                match chunk.life() {
                    Life::Visible => {
                        if self.policy.has(id) {
                            placed.push(id);
                        } else {
                            unplaced += 1;
                        }
                        pinned += usize::from(chunk.pins.any());
                    }
                    Life::Forming => idle += usize::from(chunk.writing == 0),
                    Life::Free | Life::Hidden | Life::Expected => {}
                }
            }
            let mut ordered = self.policy.dump(number);
            ordered.sort_unstable();
            let is_same = ordered == placed;
            link("policy and visible chunks", is_same, number as u32, ordered.len() as u32)?;
            count("pinned chunks of a namespace", pinned as u64, namespace.pinned as u64)?;
            count("idle list of a namespace", self.chunks.idle(number).count() as u64, idle as u64)?;
            count("length of an idle list", idle as u64, self.chunks.idle_len(number))?;
        }
        count("chunks without a place in the eviction order", unplaced, self.unplaced)
    }
}

fn count(
    what: &'static str,
    counted: impl Into<u64>,
    recorded: impl Into<u64>,
) -> Result<(), InvariantBroken> {
    let (counted, recorded) = (counted.into(), recorded.into());
    if counted == recorded { Ok(()) } else { Err(InvariantBroken::Count { what, counted, recorded }) }
}

fn link(what: &'static str, agrees: bool, at: u32, with: u32) -> Result<(), InvariantBroken> {
    if agrees {
        Ok(())
    } else {
        Err(InvariantBroken::Link { what, at: u64::from(at), with: u64::from(with) })
    }
}
