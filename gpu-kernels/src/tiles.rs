//! A chunk cut into tiles, and windows of tiles, for the kernels of `cuda/kv.cu`.
//!
//! The table of tiles depends only on the cache, so it is uploaded once; a transfer adds its block ids ([`Blocks`]), which
//! travel with the launch.

use crate::layout::{PagedKv, Plane, SKIP};

/// The most bytes of a tile, which one warp moves at a time. A multiple of 16.
pub const TILE_BYTES: u32 = 8 << 10;
/// The most block ids of one launch: they are a parameter of it, and drivers have room for 4 KiB of parameters.
pub const KV_BLOCKS: u32 = 512;
/// Tiles are cut at offsets in the shard that are multiples of this: of the widest vector, so that no cut makes a
/// vector narrower, and of 8, where checksums may be cut.
const CUT: u32 = 16;
/// Widths of the kernels' vectors.
const VECTORS: [u32; 3] = [16, 8, 4];

/// One contiguous piece of a chunk, as the kernels read it.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Tile {
    /// Address of block 0's piece.
    pub base: u64,
    /// Bytes from one block's piece to the next one's.
    pub stride: u64,
    /// Its offset in the shard, in bytes.
    pub offset: u32,
    /// Its bytes.
    pub bytes: u32,
    /// The index of its block among the chunk's block ids.
    pub position: u32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Tile>() == 32);

/// A chunk's block ids from `first` on, as the kernels read them: passed by value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Blocks {
    /// The position of `id[0]`.
    pub first: u32,
    /// Block ids; [`SKIP`] behind the window's last one.
    pub id: [u32; KV_BLOCKS as usize],
}

const _: () = assert!(size_of::<Blocks>() == 4 + 4 * KV_BLOCKS as usize);

impl Blocks {
    /// Those of the chunk's block ids that `window` needs. They have been checked ([`PagedKv::check_blocks`]).
    #[must_use]
    pub fn of(window: &Window, chunk: &[u32]) -> Blocks {
        let mut id = [SKIP; KV_BLOCKS as usize];
        let own = chunk.iter().skip(window.first_position as usize).take(window.positions as usize);
        for (to, from) in id.iter_mut().zip(own) {
            *to = *from;
        }
        Blocks { first: window.first_position, id }
    }
}

/// Consecutive tiles, which one launch moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first tile.
    pub first: u32,
    /// Number of tiles.
    pub count: u32,
    /// Its offset in the shard, in bytes: a multiple of the vector's width.
    pub offset: u32,
    /// Its bytes.
    pub bytes: u32,
    /// The position of its first block id.
    pub first_position: u32,
    /// Block ids it needs: at most [`KV_BLOCKS`].
    pub positions: u32,
}

/// A cache that the kernels cannot copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TilesError {
    /// Not even the narrowest vector fits.
    #[error(
        "group {group}, plane {plane}: expected a base, a stride and a page whose bytes are multiples of 4, got base {base:#x}, \
         stride {block_stride}, page of {page_bytes} bytes at {offset} of its block"
    )]
    Unaligned {
        /// The index of the group.
        group: usize,
        /// The plane's index in the group.
        plane: usize,
        /// Its base address.
        base: u64,
        /// Bytes between pages.
        block_stride: u64,
        /// Bytes of a page.
        page_bytes: u64,
        /// The page's offset among the pages of its block in the shard.
        offset: u64,
    },
    /// Offsets in a shard have 32 bits.
    #[error("expected a shard of at most {} bytes, got {shard_bytes}", u32::MAX)]
    TooLarge {
        /// Bytes of the shard.
        shard_bytes: u64,
    },
    /// The windows would be shorter than the longest tile.
    #[error("expected windows of at least {tile} bytes, the longest tile, got {max_bytes}")]
    WindowTooSmall {
        /// Bytes of the longest tile.
        tile: u32,
        /// The most bytes of a window.
        max_bytes: u32,
    },
}

/// A chunk cut into tiles, in the order of the shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiles {
    tiles: Vec<Tile>,
    vector: u32,
}

impl Tiles {
    /// Cuts a chunk of `kv`.
    pub fn of(kv: &PagedKv) -> Result<Tiles, TilesError> {
        let shard_bytes = kv.shard_bytes();
        if shard_bytes > u64::from(u32::MAX) {
            return Err(TilesError::TooLarge { shard_bytes });
        }
        let vector = widest_vector(kv)?;
        let (mut tiles, mut offset, mut position) = (Vec::new(), 0, 0);
        for group in kv.groups() {
            for _ in 0..group.blocks_per_chunk {
                for plane in &group.planes {
                    offset = cut(&mut tiles, plane, offset, position);
                }
                position += 1;
            }
        }
        Ok(Tiles { tiles, vector })
    }

    /// The table, as the kernels want it in their device's memory (`bytemuck::cast_slice` gives its bytes).
    #[must_use]
    pub fn table(&self) -> &[Tile] {
        &self.tiles
    }

    /// Width of the widest vector that fits all pages and their places in the shard: 16, 8 or 4 bytes. The kernels that are named
    /// after it also need the address of the shard to be a multiple of it.
    #[must_use]
    pub fn vector(&self) -> u32 {
        self.vector
    }

    /// Cuts the chunk into windows of at most `max_bytes` and [`KV_BLOCKS`] block ids, each as long as possible.
    pub fn windows(&self, max_bytes: u32) -> Result<Vec<Window>, TilesError> {
        let tile = self.tiles.iter().map(|tile| tile.bytes).max().unwrap_or(0);
        if tile > max_bytes {
            return Err(TilesError::WindowTooSmall { tile, max_bytes });
        }
        let mut windows: Vec<Window> = Vec::new();
        for (first, tile) in (0..).zip(&self.tiles) {
            if let Some(last) = windows.last_mut() {
                let positions = tile.position - last.first_position + 1;
                if tile.bytes <= max_bytes - last.bytes && positions <= KV_BLOCKS {
                    (last.count, last.bytes, last.positions) =
                        (last.count + 1, last.bytes + tile.bytes, positions);
                    continue;
                }
            }
            let &Tile { offset, bytes, position: first_position, .. } = tile;
            windows.push(Window { first, count: 1, offset, bytes, first_position, positions: 1 });
        }
        Ok(windows)
    }
}

/// The widest vector that divides all addresses, strides and pages. It divides offsets in the shard too: they are sums of pages.
fn widest_vector(kv: &PagedKv) -> Result<u32, TilesError> {
    let mut widest = VECTORS[0];
    for (group, of) in kv.groups().iter().enumerate() {
        let mut offset = 0;
        for (plane, &Plane { base, block_stride, page_bytes }) in of.planes.iter().enumerate() {
            let (base, block_stride, page_bytes) = (base as u64, block_stride as u64, page_bytes as u64);
            let all = base | block_stride | page_bytes;
            let Some(fits) = VECTORS.into_iter().find(|vector| all % u64::from(*vector) == 0) else {
                return Err(TilesError::Unaligned { group, plane, base, block_stride, page_bytes, offset });
            };
            widest = widest.min(fits);
            offset += page_bytes;
        }
    }
    Ok(widest)
}

/// Appends the tiles of one page, which begins at `start` in the shard, and returns where it ends. The shard's size has been
/// checked.
fn cut(tiles: &mut Vec<Tile>, plane: &Plane, start: u32, position: u32) -> u32 {
    let end = start + plane.page_bytes as u32;
    let mut offset = start;
    while offset < end {
        let bytes = match end - offset {
            rest if rest <= TILE_BYTES => rest,
            _ => TILE_BYTES - offset % CUT,
        };
        let base = plane.base as u64 + u64::from(offset - start);
        let stride = plane.block_stride as u64;
        tiles.push(Tile { base, stride, offset, bytes, position, reserved: 0 });
        offset += bytes;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::KvGroup;

    /// Base, stride and page.
    type Planes<'a> = &'a [(usize, usize, usize)];

    fn cache(groups: &[(Planes, u32)]) -> PagedKv {
        let groups = groups.iter().map(|(planes, blocks_per_chunk)| {
            let planes = planes.iter().map(|&(base, block_stride, page_bytes)| Plane {
                base: base as *mut u8,
                block_stride,
                page_bytes,
            });
            KvGroup { planes: planes.collect(), num_blocks: 1000, blocks_per_chunk: *blocks_per_chunk }
        });
        // SAFETY: nothing is copied in these tests.
        unsafe { PagedKv::grouped(groups.collect()) }.unwrap()
    }

    fn tile(base: u64, stride: u64, offset: u32, bytes: u32, position: u32) -> Tile {
        Tile { base, stride, offset, bytes, position, reserved: 0 }
    }

    #[test]
    fn tiles_come_in_the_order_of_the_shard() {
        let kv = cache(&[(&[(0x1000, 64, 32), (0x2000, 16, 16)], 2), (&[(0x9000, 128, 112)], 1)]);
        let tiles = Tiles::of(&kv).unwrap();
        assert_eq!(
            tiles.table(),
            [
                tile(0x1000, 64, 0, 32, 0),
                tile(0x2000, 16, 32, 16, 0),
                tile(0x1000, 64, 48, 32, 1),
                tile(0x2000, 16, 80, 16, 1),
                tile(0x9000, 128, 96, 112, 2),
            ]
        );
        assert_eq!(tiles.vector(), 16);
    }

    #[test]
    fn long_pages_are_cut_where_neither_vectors_nor_checksums_mind() {
        let kv = cache(&[(&[(0x1000, 0x10000, 4), (0x2004, 0x10000, 20000)], 1)]);
        let tiles = Tiles::of(&kv).unwrap();
        let stride = 0x10000;
        assert_eq!(
            tiles.table(),
            [
                tile(0x1000, stride, 0, 4, 0),
                tile(0x2004, stride, 4, 8188, 0),
                tile(0x2004 + 8188, stride, 8192, 8192, 0),
                tile(0x2004 + 16380, stride, 16384, 3620, 0),
            ]
        );
        let whole = Tiles::of(&cache(&[(&[(0x1000, 16384, 16384)], 1)])).unwrap();
        assert_eq!(whole.table(), [tile(0x1000, 16384, 0, 8192, 0), tile(0x3000, 16384, 8192, 8192, 0)]);
    }

    #[test]
    fn the_widest_vector_is_what_all_planes_share() {
        let width = |planes: Planes| Tiles::of(&cache(&[(planes, 2)])).map(|tiles| tiles.vector());
        assert_eq!(width(&[(16, 64, 32), (32, 64, 48)]), Ok(16));
        assert_eq!(width(&[(16, 64, 32), (24, 64, 48)]), Ok(8), "base");
        assert_eq!(width(&[(16, 56, 32)]), Ok(8), "stride");
        assert_eq!(width(&[(16, 64, 40)]), Ok(8), "page, and with it the next one's offset");
        assert_eq!(width(&[(16, 64, 36), (8, 64, 8)]), Ok(4));
        let error = width(&[(16, 64, 32), (16, 64, 34)]).unwrap_err();
        let numbers = TilesError::Unaligned {
            group: 0,
            plane: 1,
            base: 16,
            block_stride: 64,
            page_bytes: 34,
            offset: 32,
        };
        assert_eq!(error, numbers);
        assert_eq!(
            error.to_string(),
            "group 0, plane 1: expected a base, a stride and a page whose bytes are multiples of 4, got base 0x10, stride 64, \
             page of 34 bytes at 32 of its block"
        );
        assert!(matches!(width(&[(18, 64, 32)]), Err(TilesError::Unaligned { base: 18, .. })));
        assert!(matches!(width(&[(16, 62, 32)]), Err(TilesError::Unaligned { block_stride: 62, .. })));
    }

    #[test]
    fn a_shard_of_4_gib_is_refused() {
        let page = 1 << 30;
        let error = Tiles::of(&cache(&[(&[(16, page, page)], 4)])).unwrap_err();
        assert_eq!(error, TilesError::TooLarge { shard_bytes: 1 << 32 });
        assert_eq!(error.to_string(), "expected a shard of at most 4294967295 bytes, got 4294967296");
        let largest = Tiles::of(&cache(&[(&[(16, page, page)], 3), (&[(16, page, page - 16)], 1)])).unwrap();
        let last = largest.table().last().unwrap();
        assert_eq!(u64::from(last.offset) + u64::from(last.bytes), (1 << 32) - 16);
    }

    #[test]
    fn windows_hold_their_bytes_and_block_ids() {
        let kv = cache(&[(&[(0x1000, 64, 32), (0x2000, 16, 16)], 3)]);
        let tiles = Tiles::of(&kv).unwrap();
        let window = |first, count, offset, bytes, first_position, positions| Window {
            first,
            count,
            offset,
            bytes,
            first_position,
            positions,
        };
        assert_eq!(tiles.windows(1 << 20).unwrap(), [window(0, 6, 0, 144, 0, 3)]);
        assert_eq!(tiles.windows(80).unwrap(), [window(0, 3, 0, 80, 0, 2), window(3, 3, 80, 64, 1, 2)]);
        let error = tiles.windows(31).unwrap_err();
        assert_eq!(error, TilesError::WindowTooSmall { tile: 32, max_bytes: 31 });
        assert_eq!(error.to_string(), "expected windows of at least 32 bytes, the longest tile, got 31");

        let many = cache(&[(&[(16, 16, 16)], 600), (&[(16, 32, 32)], 600)]);
        let tiles = Tiles::of(&many).unwrap();
        let at_most = 1 << 20;
        assert_eq!(
            tiles.windows(at_most).unwrap(),
            [
                window(0, 512, 0, 8192, 0, 512),
                window(512, 512, 8192, 88 * 16 + 424 * 32, 512, 512),
                window(1024, 176, 9600 + 424 * 32, 176 * 32, 1024, 176),
            ]
        );
    }

    #[test]
    fn a_window_takes_its_own_block_ids() {
        let ids: Vec<u32> = (1000..1700).collect();
        let window = Window { first: 0, count: 3, offset: 0, bytes: 48, first_position: 600, positions: 3 };
        let blocks = Blocks::of(&window, &ids);
        assert_eq!((blocks.first, &blocks.id[..4]), (600, &[1600, 1601, 1602, SKIP][..]));
    }
}
