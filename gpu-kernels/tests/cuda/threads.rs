//! Both directions at once, from several threads.

use crate::support::calls;
use crate::world::*;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyMode, Direction, Fence, Transfer};
use std::collections::VecDeque;
use std::sync::{Arc, mpsc};

/// A batch in flight, and the bytes that must be there when it has ended.
struct Flying<'a> {
    transfer: Box<dyn Transfer>,
    direction: Direction,
    slot: Bytes,
    cache: &'a Cache,
    expected: Vec<u8>,
    sums: Option<Vec<u64>>,
}

impl Flying<'_> {
    fn end(self, how: u64) {
        let sums = match how % 3 {
            0 => {
                drop(self.transfer);
                None
            }
            1 => {
                let mut transfer = self.transfer;
                while !transfer.poll() {
                    std::thread::yield_now();
                }
                Some(transfer.wait().unwrap().checksums)
            }
            _ => Some(self.transfer.wait().unwrap().checksums),
        };
        let there = match self.direction {
            Direction::Store => self.slot.read(),
            Direction::Load => self.cache.all.read(),
        };
        assert!(there == self.expected, "{:?}", self.direction);
        if let (Some(sums), Some(expected)) = (sums, self.sums) {
            assert_eq!(sums, expected);
        }
    }
}

#[test]
fn many_batches_from_many_threads() {
    inside("threads::many_batches_from_many_threads", &[], |fake| {
        let context = calls::context();
        for mode in [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy] {
            let backend = &backend(mode);
            let arena = &Arena::new(16 << 20);
            let mapped = backend.map_arena(arena.mapping(Arc::new(())));
            std::thread::scope(|scope| {
                // Another thread waits for some of the transfers.
                let (send, receive) = mpsc::channel::<Flying<'_>>();
                scope.spawn(move || receive.into_iter().for_each(|flying| flying.end(2)));
                for thread in 0..3 {
                    let (send, context) = (send.clone(), context.clone());
                    scope.spawn(move || {
                        context.bind_to_thread().unwrap();
                        let mut rng = Rng(100 + thread);
                        let stream = calls::stream() as u64;
                        let mut flying = VecDeque::new();
                        for step in 0..40 {
                            // A cache must live as long as its transfers, so the test leaks it.
                            let cache: &'static Cache =
                                Box::leak(Box::new(Cache::random(&mut rng, Shape::SMALL)));
                            let slots = 40;
                            let at = (thread as usize * slots + step) * (128 << 10);
                            let bytes = cache.shard_bytes();
                            if bytes > 128 << 10 {
                                continue;
                            }
                            let direction = [Direction::Store, Direction::Load][rng.within(0, 1)];
                            let slot = Bytes { at: arena.at(at), len: bytes };
                            let shard = slot.renew(&mut rng);
                            let mut image = cache.all.renew(&mut rng);
                            let blocks = cache.blocks(&mut rng, direction, 1);
                            let expected = match direction {
                                Direction::Store => cache.gather(&image, &blocks[0]),
                                Direction::Load => {
                                    cache.scatter(&mut image, &shard, &blocks[0]);
                                    image
                                }
                            };
                            let shards = vec![(slot.at, blocks[0].clone())];
                            let fence = match rng.one_in(2) {
                                true => backend.fence(ComputeStream(stream)).unwrap(),
                                false => Fence::none(),
                            };
                            // The checksums of a store's pages, computed before anybody copies.
                            let sums = (direction == Direction::Store).then(|| {
                                let copy = Arena::new(bytes);
                                cache.sums(direction, &[(copy.at(0), blocks[0].clone())])
                            });
                            let transfer =
                                backend.submit(batch(direction, cache, true, fence, &shards)).unwrap();
                            let one = Flying { transfer, direction, slot, cache, expected, sums };
                            if rng.one_in(3) {
                                send.send(one).unwrap();
                            } else {
                                flying.push_back(one);
                            }
                            if flying.len() > 6 {
                                flying.pop_front().unwrap().end(rng.next());
                            }
                        }
                        flying.into_iter().for_each(|flying| flying.end(rng.next()));
                    });
                }
                drop(send);
            });
            drop(mapped);
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}
