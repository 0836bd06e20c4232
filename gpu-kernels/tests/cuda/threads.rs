//! Both directions at once, from several threads.

use crate::inside;
use crate::support::calls;
use crate::support::pages::Shape;
use crate::support::world::*;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, Fence, Transfer};
use std::collections::VecDeque;
use std::sync::mpsc;

const SLOT: usize = 128 << 10;
const SLOTS: usize = 40;

/// A batch in flight, with a cache of its own and a slot of the arena.
struct Flying {
    transfer: Box<dyn Transfer>,
    round: Round<'static>,
}

impl Flying {
    fn end(mut self, how: u64) {
        let done = match how % 3 {
            0 => {
                drop(self.transfer);
                None
            }
            1 => {
                while !self.transfer.poll() {
                    std::thread::yield_now();
                }
                Some(self.transfer.wait().unwrap())
            }
            _ => Some(self.transfer.wait().unwrap()),
        };
        self.round.check("from several threads", done);
    }
}

/// Copies from this thread. Another one ends some of the transfers.
fn copies(backend: &impl CopyBackend, arena: Bytes, thread: usize, send: &mpsc::Sender<Flying>) {
    let _context = calls::context();
    let mut rng = Random::new(100 + thread as u64, 0);
    let stream = ComputeStream(calls::stream() as u64);
    let mut flying = VecDeque::new();
    for step in 0..SLOTS {
        // A cache must live as long as its transfers, so the test leaks it.
        let cache: &'static Cache = Box::leak(Box::new(Cache::random(&mut rng, Shape::SMALL)));
        let bytes = cache.shard_bytes();
        if bytes > SLOT {
            continue;
        }
        let slot = arena.part((thread * SLOTS + step) * SLOT, bytes);
        let round = Round::new(&mut rng, cache, slot, DIRECTIONS[step % 2], true, vec![0]);
        let fence = match rng.one_in(2) {
            true => backend.fence(stream).unwrap(),
            false => Fence::none(),
        };
        let one = Flying { transfer: backend.submit(round.batch(fence)).unwrap(), round };
        if rng.one_in(3) {
            send.send(one).unwrap();
        } else {
            flying.push_back(one);
        }
        if flying.len() > 6 {
            flying.pop_front().unwrap().end(rng.bits());
        }
    }
    flying.into_iter().for_each(|flying| flying.end(rng.bits()));
}

#[test]
fn many_batches_from_many_threads() {
    inside(&[], |fake| {
        for mode in FORCED {
            let (backend, arena) = (&backend(mode), Arena::new(3 * SLOTS * SLOT));
            let mapped = backend.map_arena(arena.mapping());
            std::thread::scope(|scope| {
                let (send, receive) = mpsc::channel::<Flying>();
                scope.spawn(move || receive.into_iter().for_each(|flying| flying.end(2)));
                for thread in 0..3 {
                    let send = send.clone();
                    scope.spawn(move || copies(backend, arena.all, thread, &send));
                }
                drop(send);
            });
            drop(mapped);
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}
