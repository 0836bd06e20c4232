//! Moving KV between a paged cache and kvring's arena.
//!
//! A [`CopyBackend`] takes a [`CopyBatch`] and gives a [`Transfer`] to poll or wait for. The CPU backend copies with
//! the threads of this process; a GPU backend will use streams and events behind the same trait. Nothing here knows
//! of slots, keys or engines: addresses come in, bytes move, checksums come out.

mod apart;
mod backend;
pub mod checksum;
pub mod copy;
mod cpu;
mod layout;
mod sync;
mod tiles;

pub use backend::{ComputeStream, CopyBackend, CopyBatch, CopyDone, CopyError, Direction, Transfer};
pub use cpu::CpuBackend;
pub use layout::{BlockError, KvGroup, LayoutError, PagedKv, Plane, SKIP};
pub use tiles::{Blocks, KV_BLOCKS, TILE_BYTES, Tile, Tiles, TilesError, Window};
