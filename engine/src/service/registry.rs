//! Namespaces: a registered model + KV layout + parallel geometry. The first rank fixes the world, each rank its own
//! layout; keys never match across namespaces, because a namespace's id is part of every chunk's name.

use kvring_shm_abi::engine_segment::{NAMESPACES_MAX, Namespace, NamespaceInfo, RANKS_MAX};
use kvring_shm_abi::namespace::namespace_index;
use kvring_shm_abi::superblock::{Geometry, SLAB_BYTES_MAX};

/// The engine's own copy of its namespaces, so that it need not trust what lies in shared memory.
pub(crate) struct Registry {
    /// By index.
    pub(super) namespaces: Vec<Option<Known>>,
    pub(super) largest_shard: u64,
}

pub(super) struct Known {
    pub(super) id: u32,
    fingerprint: [u64; 4],
    pub(super) shape: Shape,
    /// Layout digest and bytes per shard, by rank.
    pub(super) ranks: [Option<(u64, u64)>; RANKS_MAX],
}

/// What is the same for all ranks of a namespace.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// How many ranks there are.
    pub(super) world: u32,
    /// Tokens of a chunk.
    pub(super) chunk_tokens: u32,
}

impl Registry {
    pub(crate) fn new(geometry: Geometry) -> Registry {
        Registry {
            namespaces: (0..NAMESPACES_MAX).map(|_| None).collect(),
            // A shard is contiguous and does not cross a 1 GiB boundary.
            largest_shard: geometry.arena_bytes.min(SLAB_BYTES_MAX),
        }
    }

    /// Takes over a namespace of an earlier engine. One with values that make no sense is an error, as in a registration.
    pub(crate) fn restore(&mut self, namespace: &Namespace, info: &NamespaceInfo) -> Result<(), Nonsense> {
        let world = info.world;
        if !(1..=RANKS_MAX as u32).contains(&world) {
            return Err(Nonsense { what: "world", expected: "1 to 64", got: u64::from(world) });
        }
        let rank_layout = |rank| if rank < world as usize { namespace.rank_layout(rank) } else { None };
        let ranks: [Option<(u64, u64)>; RANKS_MAX] = core::array::from_fn(rank_layout);
        if let Some((_, bytes)) = ranks.iter().flatten().find(|(_, bytes)| *bytes > self.largest_shard) {
            return Err(Nonsense { what: "shard_bytes", expected: "what fits the arena", got: *bytes });
        }
        let shape = Shape { world, chunk_tokens: info.chunk_tokens };
        self.found(info.id, info.fingerprint, shape, ranks);
        Ok(())
    }

    pub(super) fn found(
        &mut self,
        id: u32,
        fingerprint: [u64; 4],
        shape: Shape,
        ranks: [Option<(u64, u64)>; RANKS_MAX],
    ) {
        if let Some(place) = self.namespaces.get_mut(usize::from(namespace_index(id))) {
            *place = Some(Known { id, fingerprint, shape, ranks });
        }
    }

    /// The namespace with this id. `None`: there never was one, or it has been forgotten, and perhaps another one is at its index.
    #[inline]
    pub(super) fn get(&self, id: u32) -> Option<&Known> {
        self.namespaces.get(usize::from(namespace_index(id)))?.as_ref().filter(|known| known.id == id)
    }

    /// The number of namespaces that there are now.
    pub(super) fn len(&self) -> usize {
        self.namespaces.iter().flatten().count()
    }

    /// The index of the namespace with this fingerprint.
    pub(super) fn find(&self, fingerprint: &[u64; 4]) -> Option<usize> {
        self.namespaces.iter().position(|known| known.as_ref().is_some_and(|k| k.fingerprint == *fingerprint))
    }
}

/// A registration that no correct client sends.
#[derive(Debug, thiserror::Error)]
#[error("a registration with {what} {got}: expected {expected}")]
pub(crate) struct Nonsense {
    pub(super) what: &'static str,
    pub(super) expected: &'static str,
    pub(super) got: u64,
}
