//! The ways in which bytes can go, and which one is taken when.

/// How bytes are to be moved between a GPU's memory and the arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CopyMode {
    /// The way that is fastest for the layout, in each direction, as a calibration of at most 100 ms finds it.
    #[default]
    Auto,
    /// Batched DMA: a copy for each contiguous run of the cache. Uses no SM.
    Batch,
    /// Through staging buffers in the GPU's memory: a kernel gathers or scatters, one DMA moves the chunk.
    Staged,
    /// A kernel reads and writes the arena directly.
    ZeroCopy,
}

impl CopyMode {
    /// All of them.
    pub const ALL: [CopyMode; 4] = [CopyMode::Auto, CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy];

    /// Its name in options and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            CopyMode::Auto => "auto",
            CopyMode::Batch => "batch",
            CopyMode::Staged => "staged",
            CopyMode::ZeroCopy => "zerocopy",
        }
    }

    /// The mode with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<CopyMode> {
        CopyMode::ALL.into_iter().find(|mode| mode.as_str() == name)
    }
}

impl core::fmt::Display for CopyMode {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A way in which bytes go: a mode other than auto.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Batch,
    Staged,
    ZeroCopy,
}

impl Way {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Way::Batch => "batch",
            Way::Staged => "staged",
            Way::ZeroCopy => "zerocopy",
        }
    }

    /// The way that a mode asks for; `None` for auto.
    pub(super) fn of(mode: CopyMode) -> Option<Way> {
        match mode {
            CopyMode::Auto => None,
            CopyMode::Batch => Some(Way::Batch),
            CopyMode::Staged => Some(Way::Staged),
            CopyMode::ZeroCopy => Some(Way::ZeroCopy),
        }
    }
}

/// From this many contiguous bytes on the copy engines reach the link's speed without help (vLLM #42212: 51–52 of
/// 55 GB/s at 64 KiB, 4–7 at 4–24 KiB).
pub(super) const RUN_MIN: u64 = 64 << 10;
/// A batch of at most so many bytes is small: how soon it begins counts more than its speed.
pub(super) const SMALL_BYTES: u64 = 256 << 10;

/// The ways for one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// For batches above [`SMALL_BYTES`].
    pub(super) bulk: Way,
    pub(super) small: Way,
}

/// The ways for a layout: of its stores, of its loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan(pub(super) [Choice; 2]);

impl Plan {
    /// The same way for everything.
    pub(super) fn only(way: Way) -> Plan {
        Plan([Choice { bulk: way, small: way }; 2])
    }

    /// Decides without a measurement, by the length of contiguous runs.
    pub(super) fn by_rule(contiguous_bytes: u64) -> Plan {
        Plan::only(if contiguous_bytes >= RUN_MIN { Way::Batch } else { Way::Staged })
    }

    pub(super) fn way(&self, direction: crate::Direction, bytes: u64) -> Way {
        let choice = self.0[direction as usize];
        if bytes <= SMALL_BYTES { choice.small } else { choice.bulk }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for mode in CopyMode::ALL {
            assert_eq!(CopyMode::from_name(mode.as_str()), Some(mode));
        }
        assert_eq!(CopyMode::from_name("dma"), None);
    }

    #[test]
    fn small_batches_and_directions_are_told_apart() {
        let store = Choice { bulk: Way::Batch, small: Way::Staged };
        let load = Choice { bulk: Way::Staged, small: Way::ZeroCopy };
        let plan = Plan([store, load]);
        let way = |direction, bytes| plan.way(direction, bytes);
        assert_eq!(way(crate::Direction::Store, SMALL_BYTES), Way::Staged);
        assert_eq!(way(crate::Direction::Store, SMALL_BYTES + 1), Way::Batch);
        assert_eq!(way(crate::Direction::Load, 1), Way::ZeroCopy);
        assert_eq!(way(crate::Direction::Load, u64::MAX), Way::Staged);
        assert_eq!(Plan::by_rule(RUN_MIN - 1), Plan::only(Way::Staged));
        assert_eq!(Plan::by_rule(RUN_MIN), Plan::only(Way::Batch));
    }
}
