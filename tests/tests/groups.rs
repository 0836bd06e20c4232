//! Several groups of layers in one cache, pages that a load skips, and flushing by job.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{
    BlockError, Checksum, ChunkWord, JobId, Key, KvGroup, LoadChunk, PagedKv, Plane, PollingSchedulerAdapter,
    Role, SKIP, SchedulerOptions, StoreChunk, SubmitError, WorkerAdapter, WorkerOptions,
};
use kvring_tests::proto::fingerprint;
use kvring_tests::{ClientSpec, EngineProcess, LIMIT, chain, client, round};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::time::Duration;

const POISON: u8 = 0xa5;
const BLOCKS: u32 = 8;

/// Bytes of a page, and a plane's memory.
type Planes = Vec<(usize, Vec<u8>)>;

/// A cache of several groups: in each plane, pages with room after them.
struct Cache {
    groups: Vec<(Planes, u32)>,
}

impl Cache {
    fn new(groups: &[(Vec<usize>, u32)]) -> Cache {
        let plane = |page: &usize| (*page, vec![POISON; (page + 5) * BLOCKS as usize]);
        let groups = groups.iter().map(|(pages, per_chunk)| (pages.iter().map(plane).collect(), *per_chunk));
        Cache { groups: groups.collect() }
    }

    fn paged(&mut self) -> PagedKv {
        let plane = |(page, memory): &mut (usize, Vec<u8>)| Plane {
            base: memory.as_mut_ptr(),
            block_stride: *page + 5,
            page_bytes: *page,
        };
        let group = |(planes, per_chunk): &mut (Planes, u32)| KvGroup {
            planes: planes.iter_mut().map(plane).collect(),
            num_blocks: BLOCKS,
            blocks_per_chunk: *per_chunk,
        };
        // SAFETY: the memory lives until the adapter has been shut down, and is touched only while no job runs.
        unsafe { PagedKv::grouped(self.groups.iter_mut().map(group).collect()) }.unwrap()
    }

    /// The pages of a chunk, in the order of its shard: group, block id, plane.
    fn pages<'a>(&self, blocks: &'a [u32]) -> Vec<(usize, &'a u32, usize)> {
        let mut blocks = blocks.iter();
        let mut pages = Vec::new();
        for (group, (planes, per_chunk)) in self.groups.iter().enumerate() {
            for block in blocks.by_ref().take(*per_chunk as usize) {
                pages.extend((0..planes.len()).map(|plane| (group, block, plane)));
            }
        }
        pages
    }

    fn page(&mut self, (group, block, plane): (usize, &u32, usize)) -> &mut [u8] {
        let (page, memory) = &mut self.groups[group].0[plane];
        let at = *block as usize * (*page + 5);
        &mut memory[at..at + *page]
    }
}

fn byte(chunk: usize, page: usize, at: usize) -> u8 {
    (chunk * 71 + page * 13 + at * 7) as u8 & 0x7f
}

struct Both {
    worker: WorkerAdapter,
    scheduler: PollingSchedulerAdapter,
    requests: u32,
}

fn both(engine: &EngineProcess, namespace: u64, checksum: Checksum, cache: &mut Cache) -> Both {
    let workers = client(Role::Worker, &ClientSpec::new(&engine.name));
    let options = WorkerOptions { checksum, ..WorkerOptions::new(fingerprint(namespace), 1, 0, 16) };
    let mut worker = WorkerAdapter::new(&workers, options).unwrap();
    worker.register_kv_caches(cache.paged()).unwrap();
    workers.wait_ready(LIMIT).unwrap();
    let client = client(Role::Scheduler, &ClientSpec::new(&engine.name));
    client.wait_ready(LIMIT).unwrap();
    let scheduler = PollingSchedulerAdapter::new(&client, SchedulerOptions::new(fingerprint(namespace)));
    Both { worker, scheduler, requests: 0 }
}

impl Both {
    fn store(&mut self, keys: &[Key], blocks: &[Vec<u32>]) -> u32 {
        let chunks =
            keys.iter().zip(blocks).map(|(key, blocks)| StoreChunk { key: *key, blocks: blocks.clone() });
        let round = round(1);
        let job = self.worker.submit_store("r", round, None, chunks.collect(), None).unwrap();
        assert!(self.worker.wait_job(job, LIMIT));
        self.worker.get_finished().stores[0].2.stored
    }

    fn load(&mut self, keys: &[Key], blocks: &[Vec<u32>]) -> (u32, u32) {
        self.requests += 1;
        let request = self.requests.to_string();
        let handles: Vec<_> = self.scheduler.lookup(&request, 0, keys).unwrap().handles().collect();
        assert_eq!(handles.len(), keys.len());
        let chunks = handles.into_iter().zip(blocks);
        let chunks = chunks.map(|(chunk, blocks)| LoadChunk { chunk, blocks: blocks.clone() });
        let job = self.worker.submit_load(&request, chunks.collect(), None).unwrap();
        assert!(self.worker.wait_job(job, LIMIT));
        let report = self.worker.get_finished().loads[0].2;
        (report.loaded, report.failed)
    }
}

#[test]
fn groups_and_skipped_pages_come_back_as_they_were_and_nothing_else_is_written() {
    let engine = EngineProcess::start("groups", 64);
    let groups = prop::collection::vec((prop::collection::vec(1usize..9000, 1..4), 1u32..4), 1..4);
    let skips = prop::collection::vec(any::<bool>(), 64);
    let config = ProptestConfig { cases: 24, ..ProptestConfig::default() };
    let namespaces = std::cell::Cell::new(0);
    TestRunner::new(config)
        .run(&(groups, skips, any::<bool>()), |(groups, skips, verify)| {
            let namespace = namespaces.get() + 1;
            namespaces.set(namespace);
            let checksum = if verify { Checksum::Verify } else { Checksum::Off };
            let mut cache = Cache::new(&groups);
            let mut both = both(&engine, namespace, checksum, &mut cache);
            let per_chunk: u32 = groups.iter().map(|(_, per_chunk)| per_chunk).sum();
            // Two chunks in different blocks of each group.
            let blocks: Vec<Vec<u32>> = (0..2)
                .map(|chunk| {
                    let own = groups.iter().flat_map(|(_, n)| (0..*n).map(move |at| chunk * n + at));
                    own.collect()
                })
                .collect();
            let keys = chain(namespace, 2);
            for (chunk, blocks) in blocks.iter().enumerate() {
                for (index, page) in cache.pages(blocks).into_iter().enumerate() {
                    for (at, to) in cache.page(page).iter_mut().enumerate() {
                        *to = byte(chunk, index, at);
                    }
                }
            }
            prop_assert_eq!(both.store(&keys, &blocks), 2);
            for (planes, _) in &mut cache.groups {
                planes.iter_mut().for_each(|(_, memory)| memory.fill(POISON));
            }
            // Loaded to other blocks, without those that are skipped.
            let mut skips = skips.iter().cycle();
            let targets: Vec<Vec<u32>> = blocks
                .iter()
                .map(|blocks| {
                    let other = |block: &u32| if *skips.next().unwrap() { SKIP } else { BLOCKS - 1 - block };
                    blocks.iter().map(other).collect()
                })
                .collect();
            prop_assert_eq!(targets[0].len() as u32, per_chunk);
            prop_assert_eq!(both.load(&keys, &targets), (2, 0));
            for (chunk, targets) in targets.iter().enumerate() {
                for (index, page) in cache.pages(targets).into_iter().enumerate() {
                    if *page.1 == SKIP {
                        continue;
                    }
                    for (at, found) in cache.page(page).iter_mut().enumerate() {
                        prop_assert_eq!(*found, byte(chunk, index, at));
                        *found = POISON;
                    }
                }
            }
            let untouched = |(_, memory): &(usize, Vec<u8>)| memory.iter().all(|byte| *byte == POISON);
            prop_assert!(cache.groups.iter().all(|(planes, _)| planes.iter().all(untouched)));
            // All of it skipped.
            let nothing = vec![vec![SKIP; per_chunk as usize]; 2];
            prop_assert_eq!(both.load(&keys, &nothing), (2, 0));
            both.worker.shutdown();
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_failed_load_names_the_blocks_that_it_had_and_a_store_skips_nothing() {
    let mut engine = EngineProcess::start("skips", 16);
    let mut cache = Cache::new(&[(vec![100], 2), (vec![50], 1)]);
    let mut both = both(&engine, 1, Checksum::Off, &mut cache);
    let keys = chain(1, 1);
    assert_eq!(both.store(&keys, &[vec![0, 1, 2]]), 1);
    let chunks = vec![StoreChunk { key: keys[0], blocks: vec![0, SKIP, 1] }];
    let refused = both.worker.submit_store("r", round(2), None, chunks, None).unwrap_err();
    assert_eq!(refused, SubmitError::Blocks { chunk: 0, error: BlockError::NothingToStore { at: 1 } });
    let mut chunk = both.scheduler.lookup("r", 0, &keys).unwrap().handles().next().unwrap();
    chunk.word = ChunkWord::new(chunk.word.chunk(), chunk.word.generation() + 8);
    let chunks = vec![LoadChunk { chunk, blocks: vec![5, SKIP, 7] }];
    let job = both.worker.submit_load("r", chunks, None).unwrap();
    assert!(both.worker.wait_job(job, LIMIT));
    assert_eq!(both.worker.get_finished().loads[0].2.failed, 1);
    assert_eq!(both.worker.get_block_ids_with_load_errors(), [5, 7]);
    assert!(both.worker.wait_job(JobId(999), Duration::ZERO), "there is no such job");
    // `flush` of a store that a dead engine has left open: when it returns the blocks are not read any more.
    engine.stop();
    let chunks = vec![StoreChunk { key: chain(2, 1)[0], blocks: vec![0, 1, 2] }];
    let job = both.worker.submit_store("r", round(3), None, chunks, None).unwrap();
    engine.kill();
    both.worker.flush(&[JobId(1), job, JobId(999)]);
    for (planes, _) in &mut cache.groups {
        planes.iter_mut().for_each(|(_, memory)| memory.fill(0));
    }
    both.worker.shutdown();
}
