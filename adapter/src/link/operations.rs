//! The operations of one link: which operation ids and which payload regions are in use, for whom, and which operations
//! have been answered.
//!
//! ```text
//! Free → InFlight → Arrived → Taken → Free        its waiter takes the answer, then gives the region back
//!              │        ╰───────────────╯          (at once where it has no region)
//!              ╰→ Abandoned → Free                 its waiter left: undone when the answer arrives
//! ```

use super::Undo;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::message::Completion;
use kvring_shm_abi::payload::{Region, Regions};
use kvring_shm_abi::ring::DEPTH;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Free,
    InFlight { region: Region, undo: Undo },
    Abandoned { region: Region, undo: Undo },
    Arrived { region: Region, undo: Undo, completion: Completion },
    Taken { region: Region },
}

/// An answer that its waiter has taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) completion: Completion,
    /// The operation has a region, which stays its waiter's until it calls [`Operations::give_back`].
    pub(super) owns_region: bool,
}

/// What [`Operations::deliver`] did with a completion.
pub(super) enum Delivered {
    /// It is kept until its waiter takes it.
    Kept,
    /// Nobody waits for it: the caller must undo what the operation gained, and then free its region.
    Undo { undo: Undo, region: Region },
    /// The operation was not in flight: the engine has broken the protocol.
    Doubled,
}

/// The table of operations, by their ids. It knows nothing of rings: the caller that starts an operation here also sends its request.
pub(super) struct Operations {
    table: Box<[Operation]>,
    free: Vec<u16>,
    regions: Regions,
}

impl Operations {
    /// For a payload area of `words` words.
    pub(super) fn new(words: usize) -> Operations {
        Operations {
            table: (0..DEPTH).map(|_| Operation::Free).collect(),
            free: (0..DEPTH as u16).rev().collect(),
            regions: Regions::new(u32::try_from(words).unwrap_or(u32::MAX)),
        }
    }

    /// Takes an operation id, and a region of `words` words unless that is 0; `None` while there is no room.
    #[inline]
    pub(super) fn start(&mut self, words: usize, undo: impl FnOnce(Region) -> Undo) -> Option<(u16, Region)> {
        let operation = *self.free.last()?;
        let region = match words {
            0 => Region::default(),
            words => self.regions.take(u32::try_from(words).ok()?)?,
        };
        self.free.pop();
        self.table[usize::from(operation)] = Operation::InFlight { region, undo: undo(region) };
        Some((operation, region))
    }

    /// Takes in a completion that its waiter has found itself; `None` if the operation was not in flight.
    #[inline(always)]
    pub(super) fn complete(&mut self, completion: &Completion) -> Option<Done> {
        match self.table.get(usize::from(completion.operation)) {
            Some(&Operation::InFlight { region, .. }) => Some(self.hand_over(region, *completion)),
            _ => None,
        }
    }

    /// Takes in a completion of this attachment that another thread than its waiter has found.
    pub(super) fn deliver(&mut self, completion: &Completion) -> Delivered {
        let operation = completion.operation;
        match self.table.get(usize::from(operation)).copied() {
            Some(Operation::InFlight { region, undo }) => {
                self.table[usize::from(operation)] =
                    Operation::Arrived { region, undo, completion: *completion };
                Delivered::Kept
            }
            Some(Operation::Abandoned { region, undo }) => {
                self.release(operation);
                Delivered::Undo { undo, region }
            }
            Some(Operation::Free | Operation::Arrived { .. } | Operation::Taken { .. }) | None => {
                Delivered::Doubled
            }
        }
    }

    /// The answer of `operation`, if it has arrived.
    #[inline]
    pub(super) fn take(&mut self, operation: u16) -> Option<Done> {
        match self.table[usize::from(operation)] {
            Operation::Arrived { region, completion, .. } => Some(self.hand_over(region, completion)),
            _ => None,
        }
    }

    #[inline(always)]
    fn hand_over(&mut self, region: Region, completion: Completion) -> Done {
        let operation = completion.operation;
        let owns_region = region.words != 0;
        if owns_region {
            self.table[usize::from(operation)] = Operation::Taken { region };
        } else {
            self.release(operation);
        }
        Done { completion, owns_region }
    }

    /// Has the answer of `operation` arrived?
    pub(super) fn has_arrived(&self, operation: u16) -> bool {
        matches!(self.table[usize::from(operation)], Operation::Arrived { .. })
    }

    /// The waiter of `operation` is done with its region.
    #[inline]
    pub(super) fn give_back(&mut self, operation: u16) {
        if let Operation::Taken { region } = self.table[usize::from(operation)] {
            self.free_region(region);
            self.release(operation);
        }
    }

    /// The waiter of `operation` leaves without its answer. If the answer has arrived already, returns what the caller must
    /// undo now, and the region that it must free after that.
    pub(super) fn abandon(&mut self, operation: u16) -> Option<(Undo, Region, Completion)> {
        match self.table[usize::from(operation)] {
            Operation::InFlight { mut region, undo } => {
                if failpoint::broken(Rule::RegionsUntilDrained) {
                    self.free_region(core::mem::take(&mut region));
                }
                self.table[usize::from(operation)] = Operation::Abandoned { region, undo };
                None
            }
            Operation::Arrived { region, undo, completion } => {
                self.release(operation);
                Some((undo, region, completion))
            }
            Operation::Free | Operation::Abandoned { .. } | Operation::Taken { .. } => None,
        }
    }

    #[inline]
    fn release(&mut self, operation: u16) {
        self.table[usize::from(operation)] = Operation::Free;
        self.free.push(operation);
    }

    /// Frees a region that nobody reads or writes any more.
    #[inline]
    pub(super) fn free_region(&mut self, region: Region) {
        if region.words != 0 {
            self.regions.give(region);
        }
    }

    /// Is no operation id in use?
    #[inline(always)]
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == DEPTH
    }

    /// Are half of all operation ids in use?
    pub(super) fn is_half_full(&self) -> bool {
        self.free.len() <= DEPTH / 2
    }

    #[cfg(test)]
    pub(super) fn all_regions_free(&self) -> bool {
        self.regions.all_free()
    }
}
