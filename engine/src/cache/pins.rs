//! How often leases name a chunk, and who pays for it.
//!
//! Its bytes are charged once, to the client that pinned it first: a thousand requests on one shared prefix hold that
//! prefix once. When the payer lets go while others still hold it, nobody pays until a client pins it that has room for it
//! and for whatever its lookup may still find: else the others could fill the payer's share. What nobody pays for is capped
//! like a client's share; where that is used up, the payer goes on paying. So all that is leased is at most one share for
//! each client, and one more.
//!
//! A payer that goes on paying may be gone: its entry stands at what others hold, and who has the entry next begins with as
//! much less of its share, until they let go or a client pins it again. Which clients hold a chunk is not known here, only
//! how often it is held, so none of them can be charged instead; and to lift the cap for the dead would let clients that
//! come and go lease the whole arena between them.

use super::Owner;
use bytemuck::{Pod, Zeroable};

/// Bits of the count.
const COUNT_BITS: u32 = 24;
/// The most that one chunk may be pinned, and so all of them.
pub(super) const PINS_MAX: u32 = (1 << COUNT_BITS) - 1;
/// The payer of what nobody pays for.
const NOBODY: u32 = 0xff;

const _: () = assert!(super::OWNERS <= NOBODY as usize);

/// A count, and while it is not 0 the client that pays, if one does.
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

    /// Who pays for it; `None`: nobody. Means something only while it is pinned.
    #[inline]
    pub(super) fn payer(self) -> Option<Owner> {
        let payer = self.0 >> COUNT_BITS;
        (payer != NOBODY).then_some(payer as Owner)
    }

    /// From now on this client pays, or nobody.
    #[inline]
    pub(super) fn charge(&mut self, payer: Option<Owner>) {
        self.0 = self.count() | payer.map_or(NOBODY, u32::from) << COUNT_BITS;
    }

    /// One pin more. The caller keeps the count below [`PINS_MAX`].
    #[inline]
    pub(super) fn add(&mut self) {
        debug_assert!(self.count() < PINS_MAX);
        self.0 += 1;
    }

    /// One pin less.
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
