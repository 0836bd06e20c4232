//! The payload area: for what does not fit into a ring's cell (lists of keys and slots), by offset and length in 64-bit words.
//!
//! **A region belongs to its operation until that operation's completion has been drained**, also after the caller's
//! deadline has passed: a stalled engine writes its answer whenever it resumes, and must never overwrite the keys of a later
//! operation. So the adapter gives a [`Region`] back when it drains the completion, and not before.
//!
//! All access is by relaxed atomic words: a peer that overwrites them makes a wrong message, never undefined behaviour.
//! The ring's Release/Acquire orders them.

use crate::abi;
use crate::mapping::{Shared, View};
use crate::sync::{AtomicU64, Ordering};

abi! {
    /// One word of the area.
    #[repr(transparent)]
    pub struct Word(AtomicU64);
}

// SAFETY: one atomic.
unsafe impl Shared for Word {}

impl Word {
    /// A zero word in private memory, for models and unit tests.
    #[must_use]
    pub fn new() -> Word {
        Word(AtomicU64::new(0))
    }
}

impl Default for Word {
    fn default() -> Self {
        Self::new()
    }
}

/// A stretch of the area, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Region {
    /// First word.
    pub offset: u32,
    /// Number of words.
    pub words: u32,
}

/// A message names words that are not in the area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {words} words at word {offset} inside a payload area of {area} words")]
pub struct OutOfArea {
    /// First word named.
    pub offset: u32,
    /// Number of words named.
    pub words: u64,
    /// Size of the area, in words.
    pub area: usize,
}

/// The area as both sides see it.
#[derive(Clone)]
pub struct Payload {
    words: View<Word>,
}

impl Payload {
    /// Wraps the area.
    #[must_use]
    pub fn new(words: View<Word>) -> Payload {
        Payload { words }
    }

    /// Size in words.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// An area has at least one word.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    fn range(&self, offset: u32, words: usize) -> Result<&[Word], OutOfArea> {
        let start = offset as usize;
        start.checked_add(words).and_then(|end| self.words.get(start..end)).ok_or(OutOfArea {
            offset,
            words: words as u64,
            area: self.words.len(),
        })
    }

    /// Does a region of `words` words at `offset` exist?
    pub fn check(&self, offset: u32, words: usize) -> Result<(), OutOfArea> {
        self.range(offset, words).map(|_| ())
    }

    /// Copies words out, once, so that the reader validates the same words that it uses.
    #[inline]
    pub fn read(&self, offset: u32, into: &mut [u64]) -> Result<(), OutOfArea> {
        let words = self.range(offset, into.len())?;
        for (value, word) in into.iter_mut().zip(words) {
            *value = word.0.load(Ordering::Relaxed);
        }
        Ok(())
    }

    /// Copies words in.
    #[inline]
    pub fn write(&self, offset: u32, from: &[u64]) -> Result<(), OutOfArea> {
        for (word, value) in self.range(offset, from.len())?.iter().zip(from) {
            word.0.store(*value, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A writer over `words` words at `offset`, whose bounds are checked here, once.
    pub fn writer(&self, offset: u32, words: usize) -> Result<Writer<'_>, OutOfArea> {
        Ok(Writer { words: self.range(offset, words)?.iter() })
    }
}

/// Writes a region word by word, from its first on.
pub struct Writer<'a> {
    words: core::slice::Iter<'a, Word>,
}

impl Writer<'_> {
    /// Appends one word. Returns false, and drops it, when the region is full.
    #[inline]
    pub fn push(&mut self, value: u64) -> bool {
        match self.words.next() {
            Some(word) => {
                word.0.store(value, Ordering::Relaxed);
                true
            }
            None => false,
        }
    }
}

/// The free words of the area, in the client's private memory: first fit, free neighbours joined.
///
/// There are few regions (at most one or two for each operation in flight), so a sorted list is both simple and fast.
#[derive(Debug)]
pub struct Regions {
    free: Vec<Region>,
    total: u32,
}

impl Regions {
    /// An area of `words` words, all free.
    #[must_use]
    pub fn new(words: u32) -> Regions {
        let mut free = Vec::with_capacity(64);
        free.push(Region { offset: 0, words });
        Regions { free, total: words }
    }

    /// Takes `words` words (rounded up to a cache line); `None` when no free stretch is long enough now.
    pub fn take(&mut self, words: u32) -> Option<Region> {
        let words = words.max(1).checked_next_multiple_of(8)?;
        let at = self.free.iter().position(|region| region.words >= words)?;
        let hole = &mut self.free[at];
        let region = Region { offset: hole.offset, words };
        hole.offset += words;
        hole.words -= words;
        if hole.words == 0 {
            self.free.remove(at);
        }
        Some(region)
    }

    /// Gives a region back. Whoever drains an operation's completion gives its regions back, once each.
    pub fn give(&mut self, region: Region) {
        if region.words == 0 {
            return;
        }
        let at = self.free.partition_point(|hole| hole.offset < region.offset);
        debug_assert!(at == 0 || self.free[at - 1].offset + self.free[at - 1].words <= region.offset);
        debug_assert!(at == self.free.len() || region.offset + region.words <= self.free[at].offset);
        self.free.insert(at, region);
        if at + 1 < self.free.len() && self.free[at].offset + self.free[at].words == self.free[at + 1].offset
        {
            self.free[at].words += self.free.remove(at + 1).words;
        }
        if at > 0 && self.free[at - 1].offset + self.free[at - 1].words == self.free[at].offset {
            self.free[at - 1].words += self.free.remove(at).words;
        }
    }

    /// Has every region been given back?
    #[must_use]
    pub fn all_free(&self) -> bool {
        matches!(self.free[..], [Region { offset: 0, words }] if words == self.total)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn out_of_area_is_an_error_with_the_numbers() {
        let area = Payload::new(View::from_vec((0..16).map(|_| Word::new()).collect()));
        assert_eq!(area.write(12, &[1; 5]), Err(OutOfArea { offset: 12, words: 5, area: 16 }));
        assert_eq!(area.read(u32::MAX, &mut [0; 1]).map_err(|e| e.offset), Err(u32::MAX));
        assert!(area.write(12, &[7; 4]).is_ok());
        let mut out = [0; 4];
        area.read(12, &mut out).unwrap();
        assert_eq!(out, [7; 4]);
        let mut writer = area.writer(15, 1).unwrap();
        assert!(writer.push(9) && !writer.push(10));
    }

    proptest! {
        /// Regions in use never overlap, and everything comes back as one piece.
        #[test]
        fn regions_never_overlap(steps in prop::collection::vec((any::<bool>(), 1u32..200, any::<prop::sample::Index>()), 1..300)) {
            let mut regions = Regions::new(1024);
            let mut used: Vec<Region> = Vec::new();
            for (take, words, pick) in steps {
                if take {
                    if let Some(region) = regions.take(words) {
                        prop_assert!(region.words >= words && region.offset + region.words <= 1024);
                        for other in &used {
                            prop_assert!(region.offset + region.words <= other.offset || other.offset + other.words <= region.offset);
                        }
                        used.push(region);
                    }
                } else if !used.is_empty() {
                    let region = used.swap_remove(pick.index(used.len()));
                    regions.give(region);
                }
            }
            for region in used.drain(..) {
                regions.give(region);
            }
            prop_assert!(regions.all_free());
        }
    }
}
