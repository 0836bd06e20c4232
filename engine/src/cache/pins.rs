//! How often leases name a chunk, and who pays for it.
//!
//! Its bytes are charged once, to the client that pinned it first, for as long as anybody pins it: a thousand requests
//! on one shared prefix hold that prefix once. So the charges of all clients together are what is really held. Where
//! the payer lets go before another client does, the charge stays with its entry until the last one does.

use super::Owner;
use bytemuck::{Pod, Zeroable};

/// Bits of the count.
const COUNT_BITS: u32 = 24;
/// The most that one chunk may be pinned, and so all of them.
pub(super) const PINS_MAX: u32 = (1 << COUNT_BITS) - 1;

/// A count, and while it is not 0 the client that pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub(super) struct Pins(u32);

impl Pins {
    /// How often.
    #[inline]
    pub(super) fn count(self) -> u32 {
        self.0 & PINS_MAX
    }

    /// At all?
    #[inline]
    pub(super) fn any(self) -> bool {
        self.count() > 0
    }

    /// Who pays, if it is pinned.
    #[inline]
    pub(super) fn payer(self) -> Option<Owner> {
        self.any().then_some((self.0 >> COUNT_BITS) as Owner)
    }

    /// One pin more, of `owner`'s. True for the first: `owner` pays. The caller keeps the count below [`PINS_MAX`].
    #[inline]
    pub(super) fn add(&mut self, owner: Owner) -> bool {
        let first = !self.any();
        if first {
            self.0 = u32::from(owner) << COUNT_BITS;
        }
        self.0 += 1;
        first
    }

    /// One pin less: who has paid until now, if it was the last.
    #[inline]
    pub(super) fn remove(&mut self) -> Option<Owner> {
        debug_assert!(self.any());
        let payer = self.payer();
        self.0 -= 1;
        payer.filter(|_| !self.any())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pays_until_the_last_lets_go() {
        let mut pins = Pins::zeroed();
        assert_eq!((pins.count(), pins.payer()), (0, None));
        assert!(pins.add(63));
        assert!(!pins.add(1));
        assert_eq!((pins.count(), pins.payer()), (2, Some(63)));
        assert_eq!(pins.remove(), None);
        assert_eq!(pins.remove(), Some(63));
        assert!(pins.add(1));
        assert_eq!((pins.count(), pins.payer()), (1, Some(1)));
    }
}
