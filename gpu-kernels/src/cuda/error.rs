//! Errors of a GPU, of its driver, and of a cache in its memory.

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
        /// Counted in the same way.
        found: i32,
        /// What the driver lacks.
        what: String,
    },
    /// There is a driver, but no device.
    #[error("the CUDA driver finds no device; look at CUDA_VISIBLE_DEVICES and nvidia-smi")]
    NoDevice,
    /// No such device.
    #[error("expected a CUDA device below {count}, got {device}")]
    Device {
        /// The device asked for.
        device: u32,
        /// How many devices there are.
        count: u32,
    },
    /// A call of the driver failed.
    #[error("{call}: {name} ({code})")]
    Call {
        /// The driver's function.
        call: &'static str,
        /// The `CUresult`.
        code: u32,
        /// The result's name.
        name: String,
    },
    /// The stream is being captured into a graph: work that is put on it now runs later, or never.
    #[error("the stream is being captured into a CUDA graph: no copy can be ordered after it now")]
    Capturing,
    /// A page is not in the memory of the device.
    #[error(
        "KV group {group}, plane {plane}: expected {bytes} bytes of device {device}'s memory from {address:#x} on, got {got}"
    )]
    Memory {
        /// The index of the group.
        group: usize,
        /// The index of the plane in its group.
        plane: usize,
        /// The plane's first byte.
        address: u64,
        /// The plane's bytes, over all blocks.
        bytes: u64,
        /// The device.
        device: u32,
        /// What is at that address.
        got: String,
    },
    /// Kernels cannot copy this layout.
    #[error(transparent)]
    Tiles(#[from] crate::tiles::TilesError),
    /// The mode asked for is not possible here.
    #[error("copy = {asked}: not possible here: {why}")]
    Mode {
        /// The mode asked for.
        asked: &'static str,
        /// Why not.
        why: String,
    },
    /// A load's checksum covers skipped blocks too, and there is no memory in which their bytes could be summed.
    #[error(
        "a load that skips blocks needs registered host memory or a staging buffer for its checksum, and has neither"
    )]
    NoPlaceForChecksum,
    /// This process is a forked child, in which CUDA does not work.
    #[error("this process is a forked child: CUDA works in the process that began with it only")]
    Forked,
}

impl GpuError {
    /// Is there no memory left, on the device or to lock?
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, GpuError::Call { code: 2, .. })
    }

    /// Has all work in the context ended? After these results every call in the context fails, and the driver has ended whatever
    /// was running: it does not touch the memory of any copy again.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        let GpuError::Call { code, .. } = self else { return false };
        // Deinitialised, device unavailable, ECC, NVLink, illegal address, launch timed out, context destroyed, assert, hardware
        // stack, illegal instruction, misaligned address, invalid address space, invalid PC, launch failed, contained.
        // "Unknown" is not among them, because it does not tell whether anything still runs.
        matches!(code, 4 | 46 | 214 | 220 | 700 | 702 | 709 | 710 | 714..=719 | 721)
    }

    /// If the driver gives this error when it is asked whether work has ended, is it useless to ask again? Yes if all work in the
    /// context has ended, and in a forked child, which can never find out.
    pub(super) fn is_final(&self) -> bool {
        self.is_fatal() || *self == GpuError::Forked
    }
}

/// How long the driver is asked again whether work has ended, while it answers with other errors. Longer than a batch takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// The same for a load. It writes blocks that others will read, so if its end cannot be found out, vLLM has to end.
pub(super) const LOAD_PATIENCE: Duration = Duration::from_secs(30);
const ASK_EVERY: Duration = Duration::from_millis(1);

/// Waits for the end of work. An error of `wait` does not mean that the work has ended, so it is called again for a while: memory
/// that is still being copied must not be given to anybody else.
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
