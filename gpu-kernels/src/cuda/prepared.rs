//! What a backend finds out of a cache before it copies from or to it.

use super::device::Context;
use super::error::{GpuError, PATIENCE, insist};
use super::objects::{DeviceBuffer, Stream};
use super::plan::Plan;
use crate::layout::{KvGroup, Memory, PagedKv, Plane, SKIP};
use crate::tiles::{Tiles, Window};
use core::ffi::{c_int, c_void};
use std::sync::{Arc, OnceLock};

/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE` and `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`.
const MEMORY_TYPE: c_int = 2;
const DEVICE_ORDINAL: c_int = 9;
/// `CU_MEMORYTYPE_DEVICE`.
const DEVICE_MEMORY: u32 = 2;

/// A cache whose pages have been checked, and its tiles in the GPU's memory.
pub(super) struct Prepared {
    /// `None` where kernels cannot copy it.
    pub(super) tiled: Option<Tiled>,
    /// Which way its bytes go; set when that has been decided.
    pub(super) plan: OnceLock<Plan>,
}

/// A cache cut into tiles, for kernels.
pub(super) struct Tiled {
    /// Bytes of a vector.
    pub(super) vector: u32,
    pub(super) table: DeviceBuffer,
    /// Windows that fit into the staging buffers; empty if there are none.
    pub(super) staged: Vec<Window>,
    /// Windows that are as long as possible.
    pub(super) whole: Vec<Window>,
}

impl Tiled {
    /// Cuts a cache, and uploads the table. `staging` makes staging buffers for these tiles, and returns their length, or 0.
    pub(super) fn of(
        context: &Arc<Context>,
        paged: &PagedKv,
        staging: impl FnOnce(&Tiles) -> u32,
    ) -> Result<Tiled, GpuError> {
        let tiles = Tiles::of(paged)?;
        let bytes: &[u8] = bytemuck::cast_slice(tiles.table());
        // Before the staging buffers, which may take all the memory that there is.
        let table = DeviceBuffer::new(context, bytes.len())?;
        let staging_bytes = staging(&tiles);
        let staged = if staging_bytes == 0 { Vec::new() } else { tiles.windows(staging_bytes)? };
        let whole = tiles.windows(u32::MAX)?;
        let stream = Stream::new(context)?;
        let _entered = context.enter()?;
        // SAFETY: the source lives until the copy has ended, below, and the buffer has as many bytes.
        unsafe {
            let from = bytes.as_ptr().cast::<c_void>();
            context.api.cuMemcpyHtoDAsync_v2(table.address(), from, bytes.len(), stream.raw())?;
        }
        insist(PATIENCE, || stream.synchronize())?;
        Ok(Tiled { vector: tiles.vector(), table, staged, whole })
    }
}

/// Checks that every page of the cache is memory of the context's device.
pub(super) fn check_memory(context: &Context, paged: &PagedKv) -> Result<(), GpuError> {
    let device = context.info.device;
    debug_assert_eq!(paged.memory(), Memory::Cuda(device));
    let _entered = context.enter()?;
    // Layers share allocations, so the last one that was looked at is remembered.
    let mut known = (0u64, 0u64);
    for (group, of) in paged.groups().iter().enumerate() {
        for (plane, pages) in of.planes.iter().enumerate() {
            let address = pages.base as u64;
            let refused =
                |bytes: u64, got: String| GpuError::Memory { group, plane, address, bytes, device, got };
            let reach = u128::from(of.num_blocks - 1) * pages.block_stride as u128 + pages.page_bytes as u128;
            let Some(end) = u64::try_from(reach).ok().and_then(|bytes| address.checked_add(bytes)) else {
                return Err(refused(u64::MAX, "addresses beyond 64 bits".to_owned()));
            };
            let bytes = end - address;
            if known.0 <= address && end <= known.1 {
                continue;
            }
            // A plane may lie in several allocations: those that are mapped piece by piece follow one another without a gap.
            let mut at = address;
            while at < end {
                check_place(context, at).map_err(|got| match at {
                    at if at == address => refused(bytes, got),
                    at => refused(bytes, format!("an allocation that ends at {at:#x}, and then {got}")),
                })?;
                let (mut base, mut length) = (0u64, 0usize);
                // SAFETY: writes an address and a length.
                let found =
                    unsafe { context.api.cuMemGetAddressRange_v2(&raw mut base, &raw mut length, at) };
                let until = base.saturating_add(length as u64);
                if found.is_err() || until <= at || base > at {
                    return Err(refused(bytes, format!("an allocation that ends at {at:#x}")));
                }
                if base <= address {
                    known = (base, until);
                }
                at = until;
            }
        }
    }
    Ok(())
}

fn check_place(context: &Context, address: u64) -> Result<(), String> {
    let (mut kind, mut ordinal) = (0u32, 0i32);
    // SAFETY: both attributes are 32 bits wide.
    let found = unsafe {
        let kind = context.api.cuPointerGetAttribute((&raw mut kind).cast(), MEMORY_TYPE, address);
        kind.and(context.api.cuPointerGetAttribute((&raw mut ordinal).cast(), DEVICE_ORDINAL, address))
    };
    match found {
        Err(_) => Err("an address that the driver does not know".to_owned()),
        Ok(()) if kind != DEVICE_MEMORY => Err("memory of the host".to_owned()),
        Ok(()) if u32::try_from(ordinal) != Ok(context.info.device) => {
            Err(format!("memory of device {ordinal}"))
        }
        Ok(()) => Ok(()),
    }
}

/// The contiguous runs of a chunk: address and length in the cache, and offset in the shard. Pages of one allocation that follow
/// one another both in the cache and in the shard are one run.
pub(super) fn runs<'a>(paged: &'a PagedKv, blocks: &'a [u32]) -> impl Iterator<Item = Run> + 'a {
    let mut rest = blocks;
    let mut pages = paged.groups().iter().flat_map(move |group| {
        let (own, others) = rest.split_at(group.blocks_per_chunk as usize);
        rest = others;
        own.iter().flat_map(move |block| group.planes.iter().map(move |plane| (group, plane, *block)))
    });
    let mut offset = 0u64;
    let mut held: Option<(Run, &Plane)> = None;
    std::iter::from_fn(move || {
        for (group, plane, block) in pages.by_ref() {
            let (at, bytes) = (offset, plane.page_bytes);
            offset += bytes as u64;
            if block == SKIP {
                continue;
            }
            let address = plane.base as u64 + u64::from(block) * plane.block_stride as u64;
            match &mut held {
                Some((run, before)) if run.follows(address, at) && share(group, before, plane) => {
                    (run.bytes, *before) = (run.bytes + bytes, plane);
                }
                _ => {
                    let run = Run { address, offset: at, bytes };
                    if let Some((before, _)) = held.replace((run, plane)) {
                        return Some(before);
                    }
                }
            }
        }
        held.take().map(|(run, _)| run)
    })
}

/// Do these planes certainly lie in one allocation? The driver refuses a copy that goes from one allocation into the next, and
/// allocations may follow one another without a gap.
fn share(group: &KvGroup, one: &Plane, other: &Plane) -> bool {
    let apart = (one.base as usize).abs_diff(other.base as usize);
    // A page of one plane lies between two pages of the other.
    let woven = one.block_stride == other.block_stride && apart < one.block_stride && group.num_blocks > 1;
    one == other || woven
}

/// A contiguous run, see [`runs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) address: u64,
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

impl Run {
    fn follows(&self, address: u64, offset: u64) -> bool {
        self.address + self.bytes as u64 == address && self.offset + self.bytes as u64 == offset
    }
}

/// The average bytes of a chunk's runs, if no two of its blocks follow one another.
pub(super) fn contiguous_bytes(paged: &PagedKv) -> u64 {
    let per_block = |group: &KvGroup| {
        let pairs = group.planes.windows(2);
        let breaks = pairs.filter(|pair| {
            let end = pair[0].base as usize as u128 + pair[0].page_bytes as u128;
            end != pair[1].base as usize as u128 || !share(group, &pair[0], &pair[1])
        });
        u64::from(group.blocks_per_chunk) * (1 + breaks.count() as u64)
    };
    let runs = paged.groups().iter().map(per_block).fold(0, u64::saturating_add);
    paged.shard_bytes() / runs.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(planes: &[(usize, usize, usize)], blocks_per_chunk: u32) -> PagedKv {
        let plane = |&(base, block_stride, page_bytes): &(usize, usize, usize)| Plane {
            base: base as *mut u8,
            block_stride,
            page_bytes,
        };
        let planes = planes.iter().map(plane).collect();
        // SAFETY: nothing is copied.
        unsafe { PagedKv::new(planes, 100, blocks_per_chunk) }.unwrap()
    }

    fn found(kv: &PagedKv, blocks: &[u32]) -> Vec<(u64, u64, usize)> {
        runs(kv, blocks).map(|run| (run.address, run.offset, run.bytes)).collect()
    }

    #[test]
    fn what_is_contiguous_on_both_sides_is_one_run() {
        // Blocks outermost: two layers of 32 bytes beside one another.
        let kv = kv(&[(0x1000, 64, 32), (0x1020, 64, 32)], 3);
        assert_eq!(found(&kv, &[0, 1, 2]), [(0x1000, 0, 192)]);
        assert_eq!(found(&kv, &[1, 0, 5]), [(0x1040, 0, 64), (0x1000, 64, 64), (0x1140, 128, 64)]);
        assert_eq!(found(&kv, &[0, SKIP, 1]), [(0x1000, 0, 64), (0x1040, 128, 64)], "apart in the shard");
        assert_eq!(found(&kv, &[SKIP, SKIP, SKIP]), []);
        assert_eq!(contiguous_bytes(&kv), 64);
    }

    #[test]
    fn allocations_that_follow_one_another_are_two_runs() {
        // The last plane's last block, then the first plane's first one.
        let kv = kv(&[(0x1000 + 3200, 32, 32), (0x1000, 32, 32)], 2);
        assert_eq!(found(&kv, &[99, 0]).len(), 4);
        let groups = [0x1000, 0x1000 + 3200].map(|base| KvGroup {
            planes: vec![Plane { base: base as *mut u8, block_stride: 32, page_bytes: 32 }],
            num_blocks: 100,
            blocks_per_chunk: 1,
        });
        // SAFETY: nothing is copied.
        let kv = unsafe { PagedKv::grouped(groups.to_vec()) }.unwrap();
        assert_eq!(found(&kv, &[99, 0]), [(0x1000 + 99 * 32, 0, 32), (0x1000 + 3200, 32, 32)]);
        // Planes of one block each, beside one another: they may be of two allocations.
        let single = Plane { base: 0x1000 as *mut u8, block_stride: 64, page_bytes: 32 };
        let beside = Plane { base: 0x1020 as *mut u8, ..single };
        // SAFETY: as above.
        let kv = unsafe { PagedKv::new(vec![single, beside], 1, 1) }.unwrap();
        assert_eq!(found(&kv, &[0]).len(), 2);
        assert_eq!(contiguous_bytes(&kv), 32);
    }

    #[test]
    fn layers_outermost_and_padded_pages_are_not() {
        let layers = kv(&[(0x1000, 32, 32), (0x9000, 32, 32)], 2);
        assert_eq!(found(&layers, &[0, 1]).len(), 4);
        assert_eq!(contiguous_bytes(&layers), 32);
        let padded = kv(&[(0x1000, 48, 32)], 2);
        assert_eq!(found(&padded, &[0, 1]), [(0x1000, 0, 32), (0x1030, 32, 32)]);
    }
}
