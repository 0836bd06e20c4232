//! The plan of a replay, from its options, the trace and the machine.

use super::Args;
use crate::instances::{Manner, Setup};
use crate::trace::Trace;
use anyhow::{Context, bail, ensure};
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::preflight::Room;
use kvring_rig::content::LANES;
use kvring_rig::pages::Shape;
use kvring_shm_abi::lobby::CLIENTS_MAX;

/// The arena where none is given and there is room.
const ARENA_DEFAULT: ByteSize = ByteSize(1 << 30);

/// Tokens in a block of the simulated paged KV cache.
const BLOCK_TOKENS: u32 = 32;
/// Planes of the simulated paged KV cache: four layers, K and V of each in one plane.
const PLANES: u32 = 4;

/// Everything that follows from the options.
#[derive(Debug)]
pub(super) struct Resolved {
    /// How the engine is started.
    pub(super) setup: Setup,
    /// Instances.
    pub(super) instances: u32,
    /// Ranks of each.
    pub(super) ranks: u32,
    /// Names the namespace, the same in all instances.
    pub(super) fingerprint: [u64; 4],
    /// The paged KV cache of each rank.
    pub(super) shape: Shape,
    /// How clients behave.
    pub(super) manner: Manner,
}

impl Resolved {
    /// Checks the options against each other, the trace and the machine.
    pub(super) fn new(args: &Args, trace: &Trace) -> anyhow::Result<Resolved> {
        let (instances, ranks) = (args.instances, args.ranks);
        let shape = shape(args.bytes_per_token, ranks, trace)?;
        let room = Room::now();
        let arena = args.arena.unwrap_or_else(|| ByteSize(ARENA_DEFAULT.0.min(room.tightest().usable() / 2)));
        let workers = u64::from(ranks) * u64::from(instances);
        let memory = shape.kv_bytes().saturating_mul(workers).saturating_add(arena.0);
        if let Some(free) = room.memory.map(|memory| memory.available).filter(|free| memory > *free) {
            bail!(
                "expected {} of memory for the arena and the paged KV caches of all workers, {} are left; use a \
                 smaller --arena or --bytes-per-token, or fewer --instances",
                ByteSize(memory).human(),
                ByteSize(free).human()
            );
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        // Where workers outnumber the processors, a second thread in each only gets in the way.
        let copy_threads = (workers * 2 > cpus as u64).then_some(1);
        let policy = args.policy.unwrap_or_else(|| EngineConfig::default().policy);
        Ok(Resolved {
            setup: Setup { arena_bytes: arena.0, policy, client_share: None, roomy: false },
            instances,
            ranks,
            fingerprint: fingerprint(args.bytes_per_token, ranks, trace.block_tokens),
            shape,
            manner: Manner::Calm { verify: !args.no_verify, copy_threads },
        })
    }

    /// Bytes of a chunk in the arena, all ranks together.
    pub(super) fn chunk_bytes(&self) -> u64 {
        self.shape.shard_bytes() * u64::from(self.ranks)
    }
}

/// An engine must have an entry for each client.
pub(super) fn check_clients(args: &Args) -> anyhow::Result<()> {
    let (instances, ranks) = (args.instances, args.ranks);
    // The coordinator itself is one more, at the end.
    let clients = u64::from(instances) * (u64::from(ranks) + 1) + 1;
    ensure!(
        clients <= CLIENTS_MAX as u64,
        "expected at most {CLIENTS_MAX} clients of one engine, got {clients}: {instances} instances of 1 scheduler and \
         {ranks} workers, and the coordinator; use fewer --instances or --ranks"
    );
    Ok(())
}

/// The paged KV cache of one rank: pages of as many bytes as the tokens of a block have, rounded up to whole cache
/// lines, and as many blocks as the longest prompt needs.
fn shape(bytes_per_token: u32, ranks: u32, trace: &Trace) -> anyhow::Result<Shape> {
    let chunk_tokens = trace.block_tokens;
    ensure!(
        chunk_tokens.is_multiple_of(BLOCK_TOKENS),
        "expected trace blocks of a multiple of {BLOCK_TOKENS} tokens, got {chunk_tokens}"
    );
    let blocks_per_chunk = chunk_tokens / BLOCK_TOKENS;
    let block_bytes = u64::from(bytes_per_token) * u64::from(BLOCK_TOKENS);
    let page_bytes = block_bytes.div_ceil(u64::from(ranks) * u64::from(PLANES));
    let page_bytes = page_bytes.next_multiple_of(LANES as u64 * 8);
    let page_bytes = usize::try_from(page_bytes).context("--bytes-per-token: pages that no memory holds")?;
    let longest = trace.requests.iter().map(|request| request.blocks.len()).max().unwrap_or(0);
    // Half as many again: so that blocks go round, as in a real pool.
    let num_blocks = (longest as u64 * 3 / 2 + 1) * u64::from(blocks_per_chunk);
    Ok(Shape {
        planes: PLANES,
        page_bytes: [page_bytes; 2],
        gap_bytes: 0,
        blocks_per_chunk,
        blocks: u32::try_from(num_blocks).context("the trace: a prompt of more than 2^32 blocks")?,
    })
}

/// Names the namespace by all that the keys do not cover.
fn fingerprint(bytes_per_token: u32, ranks: u32, chunk_tokens: u32) -> [u64; 4] {
    [u64::from_le_bytes(*b"kvreplay"), u64::from(bytes_per_token), u64::from(ranks), u64::from(chunk_tokens)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_whole_lines_and_hold_at_least_the_tokens_bytes() {
        let trace = Trace::bundled().unwrap();
        for (bytes_per_token, ranks) in [(256, 2), (1, 1), (100, 3), (131_072, 8)] {
            let shape = shape(bytes_per_token, ranks, &trace).unwrap();
            assert!(shape.page_bytes(0).is_multiple_of(64));
            let chunk = shape.shard_bytes() * u64::from(ranks);
            assert!(chunk >= u64::from(bytes_per_token) * 512, "{bytes_per_token} × {ranks}: {chunk}");
            assert!(shape.blocks >= 239 * 16, "room for the longest prompt");
        }
        assert_eq!(shape(256, 2, &trace).unwrap().shard_bytes(), 64 << 10, "the default is exact");
    }
}
