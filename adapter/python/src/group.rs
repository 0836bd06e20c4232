//! `KvGroup`: layers that share a block table, made from the layers' tensors.

use crate::errors::{self, guarded};
use crate::planes::{Piece, Tensor, planes};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

/// Describes the layers of a KV cache that share a block table.
///
/// `num_blocks`: how many blocks there are. `blocks_per_chunk`: how many of them make a chunk. `tensors`: one tuple for each
/// layer, in an order that is the same in every process: the address of the first element, the shape, the strides in
/// elements, and the bytes of an element. The first dimension counts the blocks, or the same number of kernel blocks for each
/// block. A page is opaque bytes, and may lie in several pieces.
///
/// Raises `LayoutError` where the pages of two blocks overlap, where the first dimension is no multiple of `num_blocks`, and
/// for a description without tensors or with chunks of no block.
#[pyclass(frozen, module = "kvring._native")]
pub(crate) struct KvGroup {
    pieces: Vec<Piece>,
    /// The digest of how the pieces were made of the tensors: see [`planes`].
    order: u64,
    num_blocks: u32,
    blocks_per_chunk: u32,
}

impl KvGroup {
    /// The digest of how the planes were made of the tensors.
    pub(crate) fn order(&self) -> u64 {
        self.order
    }

    /// The group in the adapter's form.
    pub(crate) fn group(&self) -> kvring_adapter::KvGroup {
        let plane = |piece: &Piece| kvring_adapter::Plane {
            base: core::ptr::with_exposed_provenance_mut(piece.address as usize),
            block_stride: piece.stride as usize,
            page_bytes: piece.bytes as usize,
        };
        kvring_adapter::KvGroup {
            planes: self.pieces.iter().map(plane).collect(),
            num_blocks: self.num_blocks,
            blocks_per_chunk: self.blocks_per_chunk,
        }
    }
}

#[pymethods]
impl KvGroup {
    #[new]
    fn new(num_blocks: u32, blocks_per_chunk: u32, tensors: &Bound<'_, PyAny>) -> PyResult<KvGroup> {
        let py = tensors.py();
        guarded(py, || {
            let mut described = Vec::new();
            for (index, tensor) in tensors.try_iter()?.enumerate() {
                let parts = tensor?.extract::<(u64, Vec<u64>, Vec<i64>, u64)>().map_err(|error| {
                    if !error.is_instance_of::<PyOverflowError>(py) {
                        return error;
                    }
                    errors::layout(
                        py,
                        format_args!("tensors[{index}]: expected address, shape, strides and itemsize of 64 bits: {error}"),
                    )
                })?;
                let (address, shape, strides, itemsize) = parts;
                described.push(Tensor { address, shape, strides, itemsize });
            }
            if described.is_empty() || blocks_per_chunk == 0 {
                let got = described.len();
                return Err(errors::layout(
                    py,
                    format_args!(
                        "expected at least one tensor and one block per chunk, got {got} and {blocks_per_chunk}"
                    ),
                ));
            }
            let (pieces, order) =
                py.detach(|| planes(num_blocks, &described)).map_err(|text| errors::layout(py, text))?;
            Ok(KvGroup { pieces, order, num_blocks, blocks_per_chunk })
        })
    }

    /// The contiguous pieces that a block is made of, each as (address of block 0's piece, bytes from one block's piece to the
    /// next one's, bytes of the piece).
    #[getter]
    fn planes(&self) -> Vec<(u64, u64, u64)> {
        self.pieces.iter().map(|piece| (piece.address, piece.stride, piece.bytes)).collect()
    }

    /// The bytes of a block in all layers together.
    #[getter]
    fn block_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes).sum()
    }
}
