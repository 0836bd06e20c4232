//! Nonsense from a seed: the same seed gives the same nonsense again.

use kvring_rig::random::Random;
use kvring_shm_abi::message::{Key, Records, Request, Round};
use kvring_shm_abi::ring::Body;
use std::ops::{Deref, DerefMut};

/// Random numbers, and nonsense that is made of them.
pub struct Nonsense(Random);

impl Deref for Nonsense {
    type Target = Random;

    fn deref(&self) -> &Random {
        &self.0
    }
}

impl DerefMut for Nonsense {
    fn deref_mut(&mut self) -> &mut Random {
        &mut self.0
    }
}

impl Nonsense {
    /// From a seed.
    pub fn new(seed: u64) -> Nonsense {
        Nonsense(Random::new(seed, 0))
    }

    /// A number that is likely to be at the edge of something.
    pub fn edgy(&mut self) -> u32 {
        let edges =
            [0, 1, 2, 7, 8, 63, 64, 65, 255, 256, 8191, 8192, 8193, 32767, 32768, 65535, 65536, u32::MAX - 1];
        match self.below(4) {
            0 => self.bits() as u32,
            1 => u32::MAX,
            _ => self.pick(&edges),
        }
    }

    /// A key, often one that others of this fuzz use too.
    pub fn key(&mut self) -> Key {
        if self.one_in(8) { [self.bits(), self.bits()] } else { [0xf0ff, self.below(64)] }
    }

    fn records(&mut self) -> Records {
        match self.below(3) {
            0 => Records { offset: self.edgy(), count: self.edgy() },
            // Likely to be inside the area.
            _ => Records { offset: self.below(1 << 14) as u32, count: self.below(600) as u32 },
        }
    }

    fn place(&mut self) -> u32 {
        if self.one_in(3) { self.edgy() } else { self.below(1 << 15) as u32 }
    }

    /// A request that is well-formed and may say nonsense. Most of its arguments are plausible, so that also the checks
    /// behind the first one are reached.
    pub fn request(&mut self, namespace: u32) -> Request {
        let namespace = if self.one_in(4) { self.edgy() } else { namespace };
        let rank = if self.one_in(4) { self.edgy() } else { 0 };
        let session = if self.one_in(4) { self.bits() } else { self.below(8) };
        let admission = if self.one_in(4) { self.edgy() } else { self.below(4) as u32 };
        match self.below(21) {
            0 => Request::Noop,
            1 => Request::Register { record: self.place() },
            2 => Request::Unregister { namespace },
            3..=6 | 16 | 17 => {
                let first = if self.one_in(2) { 0 } else { self.edgy() };
                Request::Hold { session, admission, namespace, first, chunks: self.records() }
            }
            7 => Request::Release { session, admission, keep: self.edgy() },
            8 => Request::EndSession { session },
            9..=11 => Request::Reserve {
                round: Round { source: self.below(3) as u32, number: self.edgy() },
                namespace,
                rank,
                keys: self.records(),
                answer: self.place(),
                parent: self.one_in(2).then(|| self.place()),
            },
            12 | 13 => Request::Commit { slots: self.records(), answer: self.place() },
            14 => Request::Abort { slots: self.records(), answer: self.place() },
            15 => Request::DeclareSlots { slots: self.records(), answer: self.place() },
            18 => Request::DeclareEnd,
            19 => Request::Invalidate {
                slot: self.edgy(),
                generation: if self.one_in(2) { self.below(4) } else { self.bits() },
                key: self.key(),
            },
            _ => Request::Clear { namespace },
        }
    }

    /// Random bits in the form of a ring cell.
    pub fn body(&mut self) -> Body {
        Body { head: self.bits() as u32, words: core::array::from_fn(|_| self.bits()) }
    }

    /// A request with one bit flipped.
    pub fn damage(&mut self, mut body: Body) -> Body {
        let word = self.below(8) as usize;
        let bit = 1u64 << self.below(64);
        match body.words.get_mut(word) {
            Some(word) => *word ^= bit,
            None => body.head ^= bit as u32,
        }
        body
    }
}
