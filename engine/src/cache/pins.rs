//! How many pins a chunk has, and which client pays for it.
//!
//! A chunk's bytes are charged once, to the client that pinned it first: a thousand requests with one shared prefix
//! are charged for it once. When the payer unpins it and others still pin it, nobody pays until a client pins it
//! whose share has room for it and for all that its lookup may still find; otherwise the others could fill the
//! payer's share. The bytes that nobody pays for are limited to one share; if they have reached that, the payer
//! goes on paying. So everything that is leased is at most one share for each client, and one more.
//!
//! A payer that goes on paying may be gone. Then its entry stays charged with what others hold, and the next owner
//! of the entry has that much less of its share until the others unpin it or a client pins it again. Another holder
//! cannot be charged instead, because the chunk knows only how many pins it has and not whose they are. Nor can the
//! limit be lifted for the dead: clients that come and go could then lease the whole arena between them.

use super::Owner;
use bytemuck::{Pod, Zeroable};

/// Bits of the count.
const COUNT_BITS: u32 = 24;
/// The most pins of one chunk, and so the most pins of all chunks together.
pub(super) const PINS_MAX: u32 = (1 << COUNT_BITS) - 1;
/// Stands for the payer while nobody pays.
const NOBODY: u32 = 0xff;

const _: () = assert!(super::OWNERS <= NOBODY as usize);

/// The number of pins and, while it is not 0, the client that pays, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub(super) struct Pins(u32);

impl Pins {
    /// The number of pins.
    #[inline]
    pub(super) fn count(self) -> u32 {
        self.0 & PINS_MAX
    }

    /// Whether there is any pin.
    #[inline]
    pub(super) fn any(self) -> bool {
        self.count() > 0
    }

    /// The client that pays; `None` if nobody does. It has a meaning only while there is a pin.
    #[inline]
    pub(super) fn payer(self) -> Option<Owner> {
        let payer = self.0 >> COUNT_BITS;
        (payer != NOBODY).then_some(payer as Owner)
    }

    /// Makes this client the payer, or nobody.
    #[inline]
    pub(super) fn charge(&mut self, payer: Option<Owner>) {
        self.0 = self.count() | payer.map_or(NOBODY, u32::from) << COUNT_BITS;
    }

    /// Adds a pin. The caller keeps the count below [`PINS_MAX`].
    #[inline]
    pub(super) fn add(&mut self) {
        debug_assert!(self.count() < PINS_MAX);
        self.0 += 1;
    }

    /// Removes a pin.
    #[inline]
    pub(super) fn remove(&mut self) {
        debug_assert!(self.any());
        self.0 -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_and_payer_do_not_disturb_each_other() {
        let mut pins = Pins::zeroed();
        assert_eq!((pins.count(), pins.any()), (0, false));
        pins.charge(Some(63));
        pins.add();
        pins.add();
        assert_eq!((pins.count(), pins.payer()), (2, Some(63)));
        pins.charge(None);
        pins.remove();
        assert_eq!((pins.count(), pins.payer()), (1, None));
        pins.charge(Some(1));
        pins.remove();
        assert_eq!((pins.any(), pins.payer()), (false, Some(1)));
    }
}
