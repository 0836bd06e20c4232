//! What a GPU, its driver or a cache on it can be wrong about.

use std::time::{Duration, Instant};

/// Why a GPU cannot be used, or did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// There is no driver.
    #[error(
        "no CUDA driver here: libcuda.so.1 cannot be loaded; install NVIDIA's driver, or run without a GPU"
    )]
    NoDriver,
    /// The library is a stand-in to link with, not the driver.
    #[error("libcuda.so.1 is CUDA's stub library, not the driver: take its folder out of LD_LIBRARY_PATH")]
    StubLibrary,
    /// The driver lacks something.
    #[error(
        "expected a CUDA driver of version {}.{} or later, got {}.{}: it has no {what}",
        .expected / 1000, .expected % 1000 / 10, .found / 1000, .found % 1000 / 10
    )]
    DriverTooOld {
        /// As `cuDriverGetVersion` counts: 1000 × major + 10 × minor.
        expected: i32,
        /// The same.
        found: i32,
        /// What it was needed for.
        what: String,
    },
    /// A driver, and no device.
    #[error("the CUDA driver finds no device; look at CUDA_VISIBLE_DEVICES and nvidia-smi")]
    NoDevice,
    /// No such device.
    #[error("expected a CUDA device below {count}, got {device}")]
    Device {
        /// Asked for.
        device: u32,
        /// Devices there are.
        count: u32,
    },
    /// A call of the driver failed.
    #[error("{call}: {name} ({code})")]
    Call {
        /// Which.
        call: &'static str,
        /// A `CUresult`.
        code: u32,
        /// Its name.
        name: String,
    },
    /// The stream is being captured into a graph: what is put on it now runs later, or never.
    #[error("the stream is being captured into a CUDA graph: no copy can be ordered after it now")]
    Capturing,
    /// A page is not where it should be.
    #[error(
        "KV group {group}, plane {plane}: expected {bytes} bytes of device {device}'s memory from {address:#x} on, got {got}"
    )]
    Memory {
        /// Of which group.
        group: usize,
        /// Which of its planes.
        plane: usize,
        /// Its first byte.
        address: u64,
        /// How far it reaches over all blocks.
        bytes: u64,
        /// The device.
        device: u32,
        /// What is there.
        got: String,
    },
    /// Kernels cannot copy this layout.
    #[error(transparent)]
    Tiles(#[from] crate::tiles::TilesError),
    /// What was asked for cannot be had here.
    #[error("copy = {asked}: not possible here: {why}")]
    Mode {
        /// The mode asked for.
        asked: &'static str,
        /// Why not.
        why: String,
    },
    /// Bytes of a load that go nowhere must be summed, and there is nowhere to do it.
    #[error(
        "a load that skips blocks needs registered host memory or a staging buffer for its checksum, and has neither"
    )]
    NoPlaceForChecksum,
    /// A forked child has no GPU of its own.
    #[error("this process is a forked child: CUDA works in the process that began with it only")]
    Forked,
}

impl GpuError {
    /// Is there no memory left, on the device or to lock?
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, GpuError::Call { code: 2, .. })
    }

    /// Does nothing run in the context any more? After these results every call in it fails, and the driver has ended whatever was
    /// running: memory that copies were to read or write is not touched again.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        let GpuError::Call { code, .. } = self else { return false };
        // Deinitialised, device unavailable, ECC, NVLink, illegal address, launch timed out, context destroyed, assert, hardware
        // stack, illegal instruction, misaligned address, invalid address space, invalid PC, launch failed, contained. Not
        // "unknown": that says nothing of what runs.
        matches!(code, 4 | 46 | 214 | 220 | 700 | 702 | 709 | 710 | 714..=719 | 721)
    }

    /// As an answer to whether work has ended: is there any point in asking again? Not where all has ended with the context, and
    /// not in a forked child, where nothing of it can be known.
    pub(super) fn is_final(&self) -> bool {
        self.is_fatal() || *self == GpuError::Forked
    }
}

/// How long it is asked again whether work has ended, where the driver will not say. Longer than a batch takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// The same for a load, which writes what others will read: not knowing its end ends the process that it loads for.
pub(super) const LOAD_PATIENCE: Duration = Duration::from_secs(30);
const ASK_EVERY: Duration = Duration::from_millis(1);

/// Waits for the end of work, and does not take an error of the asking for an end: memory that is being copied must not be
/// given to somebody else.
pub(super) fn insist(
    patience: Duration,
    mut wait: impl FnMut() -> Result<(), GpuError>,
) -> Result<(), GpuError> {
    let until = Instant::now() + patience;
    loop {
        match wait() {
            Err(error) if !error.is_final() && Instant::now() < until => std::thread::sleep(ASK_EVERY),
            outcome => return outcome,
        }
    }
}
