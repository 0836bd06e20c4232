//! The GPU backend: between the paged cache in a GPU's memory and the arena.
//!
//! | file | what |
//! | --- | --- |
//! | `api` | the driver's functions, loaded at run time |
//! | `device` | which GPUs there are; the context in which this process uses one |
//! | `objects` | streams, events, memory |
//! | `kernels` | `cuda/kv.cu`, loaded and launched |
//! | `arena` | the arena, registered for DMA in the background |
//! | `lanes` | streams with a staging buffer each, taken in turns |
//! | `prepared`, `plan`, `calibrate` | what is known of a cache, and which way its bytes go |
//! | `put`, `sums`, `transfer` | a batch on its lanes, its checksums, and its end |
//! | `raw` | plain copies and a gather alone, for benchmarks and tests |
//! | `gpu` | all of it behind [`CopyBackend`](crate::CopyBackend) |
//!
//! **Order.** Each lane first waits for the fence of its batch: all that was on torch's stream when the job was submitted. So a
//! store reads what the model has written, and a load writes after the last reader. A batch's end is an event on each of its
//! lanes, which the host waits for before anything is committed or reported.
//!
//! **No copy is abandoned half-way.** Dropping a transfer waits for its end, and so does a batch that fails while it is being
//! put on its lanes.

mod api;
mod arena;
mod calibrate;
mod device;
mod error;
mod gpu;
mod kernels;
mod lanes;
mod objects;
mod plan;
mod prepared;
mod put;
pub mod raw;
mod sums;
mod transfer;

pub use device::{DeviceInfo, probe};
pub use error::GpuError;
pub use gpu::{CudaBackend, GpuOptions};
pub use plan::CopyMode;
