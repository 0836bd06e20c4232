//! A digest of what decides the order of bytes. It only shows whether two processes mean the same, and protects against nobody.

/// FNV-1a, over words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Default for Digest {
    fn default() -> Digest {
        Digest(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    /// Adds a word. The order of words counts.
    pub fn mix(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    /// The digest of all words so far.
    #[must_use]
    pub fn value(self) -> u64 {
        self.0
    }
}
