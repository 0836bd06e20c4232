//! The two ways in which a process tells of its death and waits: those of its kernel (see `probe`), or what stands in for them.

use crate::abi;

/// How others learn of a process's death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeathNotice {
    /// The kernel marks its life word, and wakes a sleeper: some 50 µs.
    RobustFutex,
    /// A file lock ends with the process; others look at it now and then, and mark the word themselves: some 50 ms.
    FileLock,
}

impl DeathNotice {
    /// For people and programs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            DeathNotice::RobustFutex => "robust futex",
            DeathNotice::FileLock => "file lock",
        }
    }
}

/// How a process waits for several words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// For all of them at once.
    Waitv,
    /// For the first one alone, in slices of time; after each it looks at the others.
    Slices,
}

impl Waiting {
    /// For people and programs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Waiting::Waitv => "futex_waitv",
            Waiting::Slices => "slices",
        }
    }
}

/// The two ways that a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Means {
    /// How its death is told.
    pub death_notice: DeathNotice,
    /// How it waits.
    pub waiting: Waiting,
}

abi! {
    const FILE_LOCK: u32 = 1;

    const SLICES: u32 = 2;
}

impl Means {
    /// As a word of shared memory: one bit for each stand-in that the process uses.
    #[must_use]
    pub fn to_bits(self) -> u32 {
        let lock = if self.death_notice == DeathNotice::FileLock { FILE_LOCK } else { 0 };
        let slices = if self.waiting == Waiting::Slices { SLICES } else { 0 };
        lock | slices
    }

    /// From a word of shared memory; unknown bits are ignored.
    #[must_use]
    pub fn from_bits(bits: u32) -> Means {
        Means {
            death_notice: if bits & FILE_LOCK == 0 {
                DeathNotice::RobustFutex
            } else {
                DeathNotice::FileLock
            },
            waiting: if bits & SLICES == 0 { Waiting::Waitv } else { Waiting::Slices },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_survive_their_word() {
        for bits in 0..4 {
            assert_eq!(Means::from_bits(bits).to_bits(), bits);
        }
        let none = Means { death_notice: DeathNotice::RobustFutex, waiting: Waiting::Waitv };
        assert_eq!((none.to_bits(), Means::from_bits(!3)), (0, none));
    }
}
