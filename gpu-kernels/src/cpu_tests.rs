//! Batches of every shape, bit-exact, with guard bytes around everything that is written.

use super::*;
use crate::batch::Fence;
use crate::copy::Loop;
use crate::layout::{BlockError, KvGroup, Memory, PagedKv, Plane, SKIP};
use proptest::prelude::*;

const GUARD: usize = 64;
const POISON: u8 = 0xA5;

/// Memory for one shard and its pages, each between guard bytes.
struct Case {
    arena: Vec<u8>,
    pages: Vec<Vec<u8>>,
}

fn content(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 37) as u8).collect()
}

fn guarded(inner: &[u8]) -> Vec<u8> {
    let mut bytes = vec![POISON; GUARD];
    bytes.extend_from_slice(inner);
    bytes.extend([POISON; GUARD]);
    bytes
}

fn guards_hold(bytes: &[u8]) -> bool {
    bytes[..GUARD].iter().chain(&bytes[bytes.len() - GUARD..]).all(|b| *b == POISON)
}

impl Case {
    fn new(seed: u64, lengths: &[usize], direction: Direction) -> Case {
        let total: usize = lengths.iter().sum();
        let whole = content(seed, total);
        let blank = vec![0u8; total];
        let (arena, paged) = if direction == Direction::Load { (&whole, &blank) } else { (&blank, &whole) };
        let mut at = 0;
        let pages = lengths.iter().map(|bytes| {
            at += bytes;
            guarded(&paged[at - bytes..at])
        });
        Case { pages: pages.collect(), arena: guarded(arena) }
    }

    /// Each page is a group of one block.
    fn paged(&mut self) -> Arc<PagedKv> {
        let groups = self.pages.iter_mut().map(|page| {
            let bytes = page.len() - 2 * GUARD;
            let base = page.as_mut_ptr().wrapping_add(GUARD);
            let plane = Plane { base, block_stride: bytes, page_bytes: bytes };
            KvGroup { planes: vec![plane], num_blocks: 1, blocks_per_chunk: 1 }
        });
        // SAFETY: the case outlives the transfer, and nobody else touches it meanwhile.
        Arc::new(unsafe { PagedKv::grouped(groups.collect()) }.unwrap())
    }

    fn start(&mut self, backend: &CpuBackend, direction: Direction, checksum: bool) -> Box<dyn Transfer> {
        let blocks = vec![0; self.pages.len()];
        self.start_blocks(backend, direction, checksum, &blocks)
    }

    fn start_blocks(
        &mut self,
        backend: &CpuBackend,
        direction: Direction,
        checksum: bool,
        blocks: &[u32],
    ) -> Box<dyn Transfer> {
        let mut batch = CopyBatch::new(direction, &self.paged(), checksum).after(Fence::none());
        // SAFETY: the case outlives the transfer, and nobody else touches it meanwhile.
        unsafe { batch.shard(self.arena.as_mut_ptr().wrapping_add(GUARD), blocks) }.unwrap();
        backend.submit(batch).unwrap()
    }

    fn check(&self, seed: u64) {
        let inner = |bytes: &[u8]| bytes[GUARD..bytes.len() - GUARD].to_vec();
        let paged: Vec<u8> = self.pages.iter().flat_map(|page| inner(page)).collect();
        let expected = content(seed, paged.len());
        assert!(inner(&self.arena) == expected, "the arena's bytes differ");
        assert!(paged == expected, "the pages' bytes differ");
        assert!(
            guards_hold(&self.arena) && self.pages.iter().all(|page| guards_hold(page)),
            "a guard was written"
        );
    }
}

fn run(backend: &CpuBackend, shards: &[Vec<usize>], direction: Direction, checksum: bool) -> Vec<u64> {
    let mut cases: Vec<Case> =
        shards.iter().zip(1..).map(|(lengths, seed)| Case::new(seed, lengths, direction)).collect();
    let running: Vec<_> = cases.iter_mut().map(|case| case.start(backend, direction, checksum)).collect();
    let sums = running.into_iter().flat_map(|transfer| transfer.wait().unwrap().checksums).collect();
    cases.iter().zip(1..).for_each(|(case, seed)| case.check(seed));
    sums
}

/// A backend that copies everything with any one of the loops.
fn backends() -> impl Strategy<Value = (usize, Loop)> {
    (1usize..5, prop::sample::select(Loop::here().collect::<Vec<_>>()))
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        prop::collection::vec(1usize..3000, 1..12),
        prop::collection::vec((1usize..40).prop_map(|pages| pages * 4096), 1..6),
        prop::collection::vec(prop_oneof![Just(PIECE - 1), Just(PIECE), Just(PIECE + 9), Just(3)], 1..4),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn every_byte_arrives_and_checksums_do_not_depend_on_the_way(
        shards in prop::collection::vec(lengths(), 1..6),
        (threads, how) in backends(),
    ) {
        let backend = CpuBackend::with(threads, Loops::only(how));
        prop_assert!(run(&backend, &shards, Direction::Load, false).is_empty());
        prop_assert!(run(&backend, &shards, Direction::Store, false).is_empty());
        let stored = run(&backend, &shards, Direction::Store, true);
        let loaded = run(&backend, &shards, Direction::Load, true);
        prop_assert_eq!(&stored, &loaded);
        // The tests of the GPU backend compare its checksums with the same plain sum over pages.
        let sum = |(lengths, seed): (&Vec<usize>, u64)| {
            let (bytes, mut at, mut sum) = (content(seed, lengths.iter().sum()), 0, 0u64);
            for page in lengths {
                sum = sum.wrapping_add(checksum::part(&bytes[at..at + page], at as u64));
                at += page;
            }
            checksum::finish(sum, at as u64)
        };
        prop_assert_eq!(stored, shards.iter().zip(1..).map(sum).collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_skipped_page_is_not_written_and_counts_in_the_checksum(
        lengths in lengths(),
        skips in prop::collection::vec(any::<bool>(), 40),
        (threads, how) in backends(),
    ) {
        let backend = CpuBackend::with(threads, Loops::only(how));
        let whole = run(&backend, core::slice::from_ref(&lengths), Direction::Load, true);
        for checksum in [false, true] {
            let mut case = Case::new(1, &lengths, Direction::Load);
            let skips = |page: usize| skips[page % skips.len()];
            for page in (0..lengths.len()).filter(|page| skips(*page)) {
                case.pages[page].fill(POISON);
            }
            let blocks: Vec<u32> = (0..lengths.len()).map(|page| if skips(page) { SKIP } else { 0 }).collect();
            let sums = case.start_blocks(&backend, Direction::Load, checksum, &blocks).wait().unwrap().checksums;
            prop_assert_eq!(sums, if checksum { whole.clone() } else { Vec::new() });
            let expected = content(1, lengths.iter().sum());
            let mut at = 0;
            for (page, bytes) in lengths.iter().enumerate() {
                let memory = &case.pages[page];
                if skips(page) {
                    prop_assert!(memory.iter().all(|byte| *byte == POISON), "page {} was written", page);
                } else {
                    prop_assert!(guards_hold(memory), "around page {}", page);
                    prop_assert!(memory[GUARD..GUARD + bytes] == expected[at..at + bytes], "page {}", page);
                }
                at += bytes;
            }
        }
    }
}

#[test]
fn many_shards_of_one_cache_make_a_batch() {
    const PAGE: usize = 3000;
    const SHARD: usize = 4 * PAGE;
    // So many that a thread takes several of them in a turn, and the last turn has fewer.
    const SHARDS: usize = 100;
    let mut memory = content(5, 16 * PAGE);
    let base = memory.as_mut_ptr();
    let plane = |at: usize| Plane { base: base.wrapping_add(at), block_stride: 2 * PAGE, page_bytes: PAGE };
    let groups = vec![KvGroup { planes: vec![plane(0), plane(PAGE)], num_blocks: 8, blocks_per_chunk: 2 }];
    // SAFETY: the memory outlives the transfers, and nobody else touches it.
    let paged = Arc::new(unsafe { PagedKv::grouped(groups) }.unwrap());
    for (threads, checksum) in [(1, false), (3, true)] {
        let mut arena = vec![0u8; SHARDS * SHARD];
        let chunks: Vec<[u32; 2]> = (0..SHARDS as u32).map(|chunk| [chunk * 5 % 8, chunk / 8 % 8]).collect();
        let mut batch = CopyBatch::new(Direction::Store, &paged, checksum);
        for (chunk, blocks) in chunks.iter().enumerate() {
            // SAFETY: as above.
            unsafe { batch.shard(arena.as_mut_ptr().wrapping_add(chunk * SHARD), blocks) }.unwrap();
        }
        assert_eq!((batch.len(), batch.bytes()), (SHARDS, (SHARDS * SHARD) as u64));
        let done = CpuBackend::new(threads).submit(batch).unwrap().wait().unwrap();
        let blocks = chunks.as_flattened().iter();
        let expected: Vec<u8> =
            blocks.flat_map(|b| memory[*b as usize * 2 * PAGE..][..2 * PAGE].to_vec()).collect();
        assert!(arena == expected);
        let sum = |shard: &[u8]| checksum::finish(checksum::part(shard, 0), SHARD as u64);
        let expected: Vec<u64> = arena.chunks_exact(SHARD).map(sum).collect();
        assert_eq!(done.checksums, if checksum { expected } else { Vec::new() });
    }
}

#[test]
fn what_cannot_be_copied_is_refused() {
    let mut case = Case::new(1, &[64, 64], Direction::Store);
    let paged = case.paged();
    let mut batch = CopyBatch::new(Direction::Store, &paged, true);
    // SAFETY: nothing is copied.
    let mut refused = |blocks: &[u32]| unsafe { batch.shard(case.arena.as_mut_ptr(), blocks) }.unwrap_err();
    assert_eq!(refused(&[0, SKIP]), BlockError::NothingToStore { at: 1 });
    assert_eq!(refused(&[1, 0]), BlockError::OutOfRange { block: 1, num_blocks: 1 });
    assert_eq!(refused(&[0]), BlockError::WrongCount { expected: 2, got: 1 });
    assert!(batch.is_empty());
    let elsewhere = Arc::new(PagedKv::clone(&paged).on(Memory::Cuda(3)));
    let backend = CpuBackend::new(1);
    let refused = backend.prepare(&elsewhere).unwrap_err().to_string();
    assert!(refused.contains("expected a KV cache in host memory"), "{refused}");
    assert!(refused.contains("got one in the memory of CUDA device 3"), "{refused}");
    assert!(backend.submit(CopyBatch::new(Direction::Store, &elsewhere, false)).is_err());
}

#[test]
fn a_transfer_that_is_only_polled_gets_on() {
    for threads in [1, 2] {
        let backend = CpuBackend::new(threads);
        let mut case = Case::new(7, &[PIECE * 3 + 5], Direction::Store);
        let mut transfer = case.start(&backend, Direction::Store, false);
        while !transfer.poll() {}
        drop(transfer);
        case.check(7);
    }
}

#[test]
fn a_dropped_transfer_has_ended_and_a_dropped_backend_too() {
    for _ in 0..20 {
        let backend = CpuBackend::new(3);
        let mut case = Case::new(3, &[PIECE * 4], Direction::Load);
        let transfer = case.start(&backend, Direction::Load, false);
        drop(backend);
        drop(transfer);
        case.check(3);
    }
}

#[test]
fn several_threads_submit_to_one_backend() {
    let backend = Arc::new(CpuBackend::new(2));
    let threads: Vec<_> = (0..4u64)
        .map(|seed| {
            let backend = backend.clone();
            std::thread::spawn(move || {
                for round in 0..20 {
                    let seed = seed * 100 + round;
                    let mut case = Case::new(seed, &[70_000, 4096, 9], Direction::Store);
                    case.start(&backend, Direction::Store, false).wait().unwrap();
                    case.check(seed);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn an_empty_batch_is_done_at_once() {
    let backend = CpuBackend::new(2);
    let batch = CopyBatch::new(Direction::Store, &Case::new(1, &[8], Direction::Store).paged(), true);
    assert!(batch.is_empty() && batch.bytes() == 0);
    assert_eq!(backend.submit(batch).unwrap().wait().unwrap(), CopyDone::default());
}
