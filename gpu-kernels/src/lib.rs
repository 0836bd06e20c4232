//! Moving KV between a paged cache and kvring's arena.
//!
//! A [`CopyBackend`] takes a [`CopyBatch`] and gives a [`Transfer`] to poll or wait for. The CPU backend copies with
//! the threads of this process, the GPU backend ([`CudaBackend`]) with kernels and the copy engines of a GPU. Nothing here
//! knows of slots, keys or engines: addresses come in, bytes move, checksums come out.

mod apart;
mod backend;
mod batch;
pub mod checksum;
pub mod copy;
mod cpu;
mod cuda;
mod digest;
mod layout;
mod loops;
mod sync;
mod tiles;

pub use backend::{ArenaMapping, CopyBackend, CopyDone, CopyError, MappedArena, MappedAsItIs, Transfer};
pub use batch::{ComputeStream, CopyBatch, Direction, Fence};
pub use cpu::CpuBackend;
pub use cuda::raw;
pub use cuda::{CopyMode, CudaBackend, DeviceInfo, GpuError, GpuOptions, probe};
pub use digest::Digest;
pub use layout::{BlockError, KvGroup, LayoutError, Memory, PagedKv, Plane, SKIP};
pub use loops::Loops;
pub use tiles::{Blocks, KV_BLOCKS, TILE_BYTES, Tile, Tiles, TilesError, Window};
