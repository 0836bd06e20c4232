//! Batches of every shape, bit-exact, with guard bytes around everything that is written.

use super::*;
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

    fn add_to(&mut self, batch: &mut CopyBatch) {
        let pages = self.pages.iter_mut().map(|page| {
            let bytes = page.len() - 2 * GUARD;
            (page.as_mut_ptr().wrapping_add(GUARD), bytes)
        });
        // SAFETY: the case outlives the transfer, and nobody else touches it meanwhile.
        unsafe { batch.shard(self.arena.as_mut_ptr().wrapping_add(GUARD), pages.collect::<Vec<_>>()) };
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

fn run(shards: &[Vec<usize>], direction: Direction, threads: usize, checksum: bool) -> Vec<u64> {
    let backend = CpuBackend::new(threads);
    let mut cases: Vec<Case> =
        shards.iter().zip(1..).map(|(lengths, seed)| Case::new(seed, lengths, direction)).collect();
    let mut batch = CopyBatch::new(direction, checksum);
    cases.iter_mut().for_each(|case| case.add_to(&mut batch));
    let done = backend.submit(batch).unwrap().wait().unwrap();
    cases.iter().zip(1..).for_each(|(case, seed)| case.check(seed));
    done.checksums
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
        threads in 1usize..5,
    ) {
        prop_assert!(run(&shards, Direction::Load, threads, false).is_empty());
        let stored = run(&shards, Direction::Store, threads, true);
        let loaded = run(&shards, Direction::Load, 1, true);
        prop_assert_eq!(&stored, &loaded);
        prop_assert_eq!(stored.len(), shards.len());
        prop_assert!(stored.iter().all(|sum| *sum != checksum::NONE));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_skipped_page_is_not_written_and_counts_in_the_checksum(
        lengths in lengths(),
        skips in prop::collection::vec(any::<bool>(), 40),
        threads in 1usize..4,
    ) {
        let whole = run(core::slice::from_ref(&lengths), Direction::Load, threads, true);
        for checksum in [false, true] {
            let backend = CpuBackend::new(threads);
            let mut case = Case::new(1, &lengths, Direction::Load);
            let skips = |page: usize| skips[page % skips.len()];
            for page in (0..lengths.len()).filter(|page| skips(*page)) {
                case.pages[page].fill(POISON);
            }
            let mut batch = CopyBatch::new(Direction::Load, checksum);
            let pages: Vec<_> = case.pages.iter_mut().enumerate().map(|(page, memory)| {
                let at = memory.as_mut_ptr().wrapping_add(GUARD);
                (if skips(page) { core::ptr::null_mut() } else { at }, memory.len() - 2 * GUARD)
            }).collect();
            // SAFETY: as in `add_to`; pages that are skipped have no address.
            unsafe { batch.shard(case.arena.as_mut_ptr().wrapping_add(GUARD), pages) };
            let sums = backend.submit(batch).unwrap().wait().unwrap().checksums;
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
fn a_store_of_a_page_without_address_is_refused() {
    let mut arena = vec![0u8; 64];
    let mut batch = CopyBatch::new(Direction::Store, true);
    // SAFETY: the arena's side is there; nothing is copied.
    unsafe { batch.shard(arena.as_mut_ptr(), [(core::ptr::null_mut(), 64)]) };
    let refused = CpuBackend::new(1).submit(batch).map(|_| ()).unwrap_err();
    assert_eq!(refused, CopyError::NothingToStore);
}

#[test]
fn a_transfer_that_is_only_polled_gets_on() {
    for threads in [1, 2] {
        let backend = CpuBackend::new(threads);
        let mut case = Case::new(7, &[PIECE * 3 + 5], Direction::Store);
        let mut batch = CopyBatch::new(Direction::Store, false);
        case.add_to(&mut batch);
        let mut transfer = backend.submit(batch).unwrap();
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
        let mut batch = CopyBatch::new(Direction::Load, false);
        case.add_to(&mut batch);
        let transfer = backend.submit(batch).unwrap();
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
                    let mut batch = CopyBatch::new(Direction::Store, false).after(crate::ComputeStream(0));
                    case.add_to(&mut batch);
                    backend.submit(batch).unwrap().wait().unwrap();
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
    let batch = CopyBatch::new(Direction::Store, true);
    assert!(batch.is_empty() && batch.bytes() == 0);
    assert_eq!(backend.submit(batch).unwrap().wait().unwrap(), CopyDone::default());
}
