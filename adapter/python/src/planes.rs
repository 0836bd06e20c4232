//! From tensors to planes: the contiguous pieces that a block's page is made of.

use kvring_adapter::Digest;

/// No KV cache has more planes than that.
pub(crate) const PLANES_MAX: usize = 1 << 16;
/// The most pairs of pieces that are compared for an overlap. Only pieces that interleave as in no KV cache have more.
const PAIRS_MAX: usize = 1 << 24;
/// Addresses are below this.
const ADDRESS_MAX: u64 = i64::MAX as u64;

/// One layer's tensor: the first dimension counts blocks, or kernel blocks.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// The address of the first element.
    pub(crate) address: u64,
    pub(crate) shape: Vec<u64>,
    /// Strides in elements.
    pub(crate) strides: Vec<i64>,
    /// Bytes of an element.
    pub(crate) itemsize: u64,
}

/// A contiguous piece of each block: the first block's is at `address`, the next one's `stride` bytes further on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The index of the tensor that it belongs to, or begins in.
    pub(crate) tensor: usize,
    pub(crate) address: u64,
    pub(crate) stride: u64,
    pub(crate) bytes: u64,
}

impl Piece {
    /// The first address behind the last block's piece.
    fn end(&self, num_blocks: u64) -> u64 {
        self.address + self.stride * (num_blocks - 1) + self.bytes
    }
}

/// The pieces of a group's blocks, in an order that follows from shapes and strides alone: tensor after tensor, and in
/// each by address. If all of a block lies together (vLLM's layouts with the blocks outermost), neighbours are joined,
/// most often to one piece.
///
/// Also returns a digest of what the pieces alone do not show: where in a block each tensor's bytes are, and in which
/// order its dimensions lie in memory. It is the same wherever the cache lies and however many blocks it has.
pub(crate) fn planes(num_blocks: u32, tensors: &[Tensor]) -> Result<(Vec<Piece>, u64), String> {
    if num_blocks == 0 {
        return Err("num_blocks: expected at least 1, got 0".to_owned());
    }
    let num_blocks = u64::from(num_blocks);
    let mut all = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        let pieces = pieces(num_blocks, index, tensor).map_err(|text| format!("tensors[{index}]: {text}"))?;
        all.extend(pieces);
        if all.len() > PLANES_MAX {
            return Err(format!("expected at most {PLANES_MAX} contiguous pieces of a block, got more"));
        }
    }
    check_overlap(num_blocks, &all)?;
    let mut digest = Digest::default();
    tensors.iter().for_each(|tensor| mix_tensor(&mut digest, num_blocks, tensor));
    let pieces = joined(num_blocks, all, &mut digest);
    Ok((pieces, digest.value()))
}

/// Mixes in a tensor's element size and shape, and the order of its dimensions in memory. It leaves out the strides:
/// where heads are outside the blocks, strides depend on the number of blocks.
fn mix_tensor(digest: &mut Digest, num_blocks: u64, tensor: &Tensor) {
    digest.mix(tensor.itemsize);
    digest.mix(tensor.shape.len() as u64);
    let mut dimensions: Vec<(i64, usize, u64)> = Vec::with_capacity(tensor.shape.len());
    for (at, (&size, &stride)) in tensor.shape.iter().zip(&tensor.strides).enumerate() {
        let size = if at == 0 { size / num_blocks } else { size };
        digest.mix(size);
        // A dimension of one element has no place in that order.
        if size > 1 {
            dimensions.push((stride, at, size));
        }
    }
    dimensions.sort_unstable();
    dimensions.iter().for_each(|(_, at, _)| digest.mix(*at as u64));
}

/// If all of a block comes before anything of the next one, sorts the pieces by address and joins neighbours. Only in
/// that case is the order of addresses the same wherever the cache lies, and whatever allocations it is made of.
fn joined(num_blocks: u64, pieces: Vec<Piece>, digest: &mut Digest) -> Vec<Piece> {
    let [first, rest @ ..] = &pieces[..] else { return pieces };
    let from = pieces.iter().map(|piece| piece.address).min().unwrap_or(0);
    let end = pieces.iter().map(|piece| piece.address + piece.bytes).max().unwrap_or(0);
    if num_blocks == 1 || rest.iter().any(|piece| piece.stride != first.stride) || end - from > first.stride {
        return pieces;
    }
    let mut pieces: Vec<(usize, Piece)> = pieces.into_iter().enumerate().collect();
    pieces.sort_unstable_by_key(|(_, piece)| piece.address);
    for (index, piece) in &pieces {
        digest.mix(*index as u64);
        digest.mix(piece.bytes);
    }
    pieces.dedup_by(|(_, piece), (_, before)| {
        let follows = before.address + before.bytes == piece.address;
        if follows {
            before.bytes += piece.bytes;
        }
        follows
    });
    pieces.into_iter().map(|(_, piece)| piece).collect()
}

fn pieces(num_blocks: u64, index: usize, tensor: &Tensor) -> Result<Vec<Piece>, String> {
    let Tensor { address, shape, strides, itemsize } = tensor;
    let (address, itemsize) = (*address, *itemsize);
    if address == 0 || itemsize == 0 {
        return Err(format!(
            "expected an address and an itemsize above 0, got address {address:#x}, itemsize {itemsize}"
        ));
    }
    if shape.is_empty() || shape.len() != strides.len() || shape.contains(&0) {
        return Err(format!(
            "expected a shape of at least one dimension, none of them empty, and a stride for each, got shape {shape:?}, \
             strides {strides:?}"
        ));
    }
    if !shape[0].is_multiple_of(num_blocks) {
        return Err(format!(
            "expected a first dimension that is a multiple of {num_blocks} blocks, got {}",
            shape[0]
        ));
    }
    let too_far = || {
        format!("expected addresses below 2^63, got shape {shape:?}, strides {strides:?} of {itemsize} bytes")
    };
    // Size, and stride in bytes, of each dimension. The stride of a dimension of size 1 means nothing.
    let mut dimensions = Vec::with_capacity(shape.len());
    for (&size, &stride) in shape.iter().zip(strides) {
        if size == 1 {
            dimensions.push((1, 0));
            continue;
        }
        let stride = u64::try_from(stride).ok().filter(|stride| *stride > 0);
        let stride =
            stride.ok_or_else(|| format!("expected strides above 0, got {strides:?} for shape {shape:?}"))?;
        dimensions.push((size, stride.checked_mul(itemsize).ok_or_else(too_far)?));
    }
    // The last byte's address, with checks for overflow.
    let mut last = address.checked_add(itemsize - 1).ok_or_else(too_far)?;
    for (size, stride) in &dimensions {
        let more = (size - 1).checked_mul(*stride).ok_or_else(too_far)?;
        last = last.checked_add(more).filter(|last| *last < ADDRESS_MAX).ok_or_else(too_far)?;
    }
    let kernel_blocks = shape[0] / num_blocks;
    let (_, first_stride) = dimensions[0];
    dimensions[0] = (kernel_blocks, first_stride);
    dimensions.retain(|(size, _)| *size > 1);
    dimensions.sort_unstable_by_key(|(_, stride)| *stride);
    let mut run = itemsize;
    let mut outer = &dimensions[..];
    while let [(size, stride), rest @ ..] = outer
        && *stride == run
    {
        (run, outer) = (run * size, rest);
    }
    let count = outer.iter().try_fold(1u64, |count, (size, _)| count.checked_mul(*size));
    if count.is_none_or(|count| count > PLANES_MAX as u64) {
        return Err(format!(
            "expected at most {PLANES_MAX} contiguous pieces of a block, got shape {shape:?}, strides {strides:?}"
        ));
    }
    let mut offsets = vec![0u64];
    for (size, stride) in outer {
        offsets = (0..*size).flat_map(|at| offsets.iter().map(move |offset| offset + at * stride)).collect();
    }
    offsets.sort_unstable();
    let mut pieces: Vec<Piece> = Vec::with_capacity(offsets.len());
    for offset in offsets {
        let start = address + offset;
        match pieces.last_mut() {
            Some(before) if before.address + before.bytes == start => before.bytes += run,
            Some(before) if before.address + before.bytes > start => {
                return Err(format!(
                    "expected elements that do not overlap, got shape {shape:?}, strides {strides:?}"
                ));
            }
            _ => pieces.push(Piece { tensor: index, address: start, stride: 0, bytes: run }),
        }
    }
    for piece in &mut pieces {
        piece.stride = if num_blocks == 1 { piece.bytes } else { kernel_blocks * first_stride };
    }
    Ok(pieces)
}

fn overlap(one: &Piece, other: &Piece) -> String {
    let Piece { tensor, address, stride, bytes } = one;
    let (tensor2, address2, stride2, bytes2) = (other.tensor, other.address, other.stride, other.bytes);
    format!(
        "expected pages that do not overlap, got tensors[{tensor}]: {bytes} bytes at {address:#x}, {stride} bytes from block \
         to block, and tensors[{tensor2}]: {bytes2} bytes at {address2:#x}, {stride2} bytes from block to block"
    )
}

/// Checks that no byte belongs to two blocks, or to two pieces.
fn check_overlap(num_blocks: u64, pieces: &[Piece]) -> Result<(), String> {
    if let Some(piece) = pieces.iter().find(|piece| piece.bytes > piece.stride) {
        return Err(overlap(piece, piece));
    }
    let mut sorted: Vec<&Piece> = pieces.iter().collect();
    sorted.sort_unstable_by_key(|piece| piece.address);
    // Find groups of pieces whose ranges, over all blocks, overlap in a chain.
    let (mut from, mut end) = (0, 0);
    let mut pairs = 0;
    for to in 0..=sorted.len() {
        if sorted.get(to).is_none_or(|piece| piece.address >= end) {
            check_interleaved(num_blocks, &sorted[from..to], &mut pairs)?;
            from = to;
        }
        end = sorted.get(to).map_or(end, |piece| end.max(piece.end(num_blocks)));
    }
    Ok(())
}

/// Checks pieces that are sorted by address and whose ranges over all blocks interleave.
fn check_interleaved(num_blocks: u64, pieces: &[&Piece], pairs: &mut usize) -> Result<(), String> {
    let [first, .., last] = pieces else { return Ok(()) };
    if num_blocks == 1 {
        return Err(overlap(first, pieces[1]));
    }
    let stride = first.stride;
    if let Some(other) = pieces.iter().find(|piece| piece.stride != stride) {
        // An exact answer is not worth it: in a KV cache, tensors of different strides lie apart.
        return Err(overlap(first, other));
    }
    for two in pieces.windows(2) {
        if two[0].address + two[0].bytes > two[1].address {
            return Err(overlap(two[0], two[1]));
        }
    }
    // Everything of a block comes before anything of the next one, as in all caches with the blocks outermost.
    if last.address + last.bytes - first.address <= stride {
        return Ok(());
    }
    // Where a piece lies: the offset within the first piece's stride, and the block of the first piece that it lies
    // beside.
    let place =
        |piece: &Piece| ((piece.address - first.address) % stride, (piece.address - first.address) / stride);
    let mut placed: Vec<((u64, u64), &Piece)> = pieces.iter().map(|piece| (place(piece), *piece)).collect();
    placed.sort_unstable_by_key(|(place, _)| *place);
    for (index, ((rest, block), piece)) in placed.iter().enumerate() {
        let later = placed[index + 1..].iter().map(|((rest, block), piece)| (*rest, block + 1, *piece));
        let wrapped = placed[..index].iter().map(|((rest, block), piece)| (rest + stride, *block, *piece));
        for (rest2, block2, piece2) in later.chain(wrapped) {
            if rest2 - rest >= piece.bytes {
                break;
            }
            *pairs += 1;
            if (block + 1).abs_diff(block2) < num_blocks || *pairs > PAIRS_MAX {
                return Err(overlap(piece, piece2));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn tensor(address: u64, shape: &[u64], strides: &[i64], itemsize: u64) -> Tensor {
        Tensor { address, shape: shape.to_vec(), strides: strides.to_vec(), itemsize }
    }

    fn of(num_blocks: u32, tensor: Tensor) -> Vec<(u64, u64, u64)> {
        let (pieces, _) = planes(num_blocks, &[tensor]).unwrap();
        pieces.iter().map(|piece| (piece.address, piece.stride, piece.bytes)).collect()
    }

    #[test]
    fn what_vllm_has() {
        // vLLM's CPU backend: one page for each block.
        let cpu = tensor(4096, &[256, 2, 32, 128], &[8192, 4096, 128, 1], 4);
        assert_eq!(of(256, cpu), [(4096, 32768, 32768)]);
        // Two kernel blocks for each block.
        let kernel = tensor(4096, &[512, 2, 32, 128], &[8192, 4096, 128, 1], 4);
        assert_eq!(of(256, kernel), [(4096, 65536, 65536)]);
        // The same, with room after each kernel block.
        let gaps = tensor(4096, &[4, 8], &[10, 1], 2);
        assert_eq!(of(2, gaps), [(4096, 40, 16), (4116, 40, 16)]);
        // Heads outermost.
        let heads = tensor(4096, &[10, 4, 8], &[8, 80, 1], 1);
        assert_eq!(of(10, heads), [0, 80, 160, 240].map(|at| (4096 + at, 8, 8)));
        // Dimensions of one element have any stride.
        assert_eq!(of(1, tensor(4096, &[1, 1, 3], &[-7, 0, 1], 2)), [(4096, 6, 6)]);
    }

    /// Two layers of two heads, four tokens of 8 bytes each, five blocks, as vLLM's layouts name them: the outermost first.
    fn layers(layout: &str, room: i64) -> Vec<Tensor> {
        let size = |axis| match axis {
            'B' => 5,
            'L' | 'H' => 2,
            'N' => 4,
            _ => 8,
        };
        let mut strides = std::collections::BTreeMap::new();
        let mut extent = 1;
        for axis in layout.chars().rev() {
            // Padded pages, or padded blocks.
            extent += if axis == 'B' { room } else { 0 };
            strides.insert(axis, extent);
            extent *= size(axis);
        }
        let inner = ['B', 'H', 'N', 'C'];
        let layer = |layer: i64| {
            let shape = inner.map(|axis| size(axis) as u64);
            tensor(4096 + (layer * strides[&'L']) as u64, &shape, &inner.map(|axis| strides[&axis]), 1)
        };
        (0..2).map(layer).collect()
    }

    #[test]
    fn layouts_of_vllm() {
        let found = |layout, room| {
            let (pieces, _) = planes(5, &layers(layout, room)).unwrap();
            pieces.iter().map(|piece| (piece.address - 4096, piece.stride, piece.bytes)).collect::<Vec<_>>()
        };
        for blocks_outermost in ["BLHNC", "BLNHC", "BHLNC"] {
            assert_eq!(found(blocks_outermost, 0), [(0, 128, 128)], "{blocks_outermost}");
            assert_eq!(found(blocks_outermost, 16), [(0, 144, 128)], "{blocks_outermost}");
        }
        for layers_outermost in ["LBHNC", "LBNHC"] {
            assert_eq!(found(layers_outermost, 0), [(0, 64, 64), (320, 64, 64)], "{layers_outermost}");
            assert_eq!(found(layers_outermost, 16), [(0, 80, 64), (400, 80, 64)], "{layers_outermost}");
        }
        let heads = [0, 160, 320, 480].map(|at| (at, 32, 32));
        assert_eq!(found("LHBNC", 0), heads);
        // Other layers' pages lie in between, as when two groups each have blocks of their own in the same memory.
        let some = [layers("BLHNC", 64)[0].clone(), tensor(4096 + 128, &[5, 2, 4, 8], &[192, 32, 8, 1], 1)];
        assert_eq!(of(5, some[0].clone()), [(4096, 192, 64)]);
        assert_eq!(planes(5, &some).unwrap().0.len(), 2);
        // The order of the layers does not matter.
        let mut turned = layers("BLHNC", 0);
        turned.reverse();
        assert_eq!(planes(5, &turned).unwrap().0.len(), 1);
        // MLA: one head.
        let mla = [0, 32].map(|at| tensor(4096 + at, &[5, 1, 4, 8], &[64, 32, 8, 1], 1));
        assert_eq!(planes(5, &mla).unwrap().0.len(), 1);
        // With one block only, nothing tells where the next one would be.
        let alone = [0, 8].map(|at| tensor(4096 + at, &[1, 8], &[16, 1], 1));
        assert_eq!(planes(1, &alone).unwrap().0.len(), 2);
    }

    #[test]
    fn the_digest_tells_what_equal_pieces_mean() {
        let of = |tensors: &[Tensor]| planes(5, tensors).unwrap();
        let (pieces, digest) = of(&layers("BLHNC", 0));
        let mut turned = layers("BLHNC", 0);
        turned.reverse();
        let others = [turned, layers("BLNHC", 0), layers("BHLNC", 0)];
        for other in &others {
            let (same, another) = of(other);
            let planes = |pieces: &[Piece]| {
                pieces.iter().map(|piece| (piece.address, piece.stride, piece.bytes)).collect::<Vec<_>>()
            };
            assert_eq!(planes(&same), planes(&pieces));
            assert_ne!(another, digest, "{other:?}");
        }
        assert_ne!(of(&layers("LBHNC", 0)).1, of(&layers("LBNHC", 0)).1, "one page each, other bytes in it");
        assert_ne!(of(&layers("LHBNC", 0)).1, of(&layers("LBNHC", 0)).1);
        // Address, padding and the number of blocks do not change what the bytes mean.
        for layout in ["BLHNC", "BHLNC", "LBNHC", "LHBNC"] {
            let digest = of(&layers(layout, 0)).1;
            let mut moved = layers(layout, 0);
            moved.iter_mut().for_each(|tensor| tensor.address += 1 << 20);
            assert_eq!(of(&moved).1, digest, "{layout}");
            if layout != "LHBNC" {
                assert_eq!(of(&layers(layout, 16)).1, digest, "{layout}, padded");
            }
        }
        let heads = |num_blocks: u32| {
            let blocks = i64::from(num_blocks);
            let one = tensor(4096, &[u64::from(num_blocks), 2, 4, 8], &[32, 32 * blocks, 8, 1], 1);
            planes(num_blocks, &[one]).unwrap().1
        };
        assert_eq!(heads(5), heads(9));
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_numbers() {
        let refused = |num_blocks, tensors: &[Tensor]| planes(num_blocks, tensors).unwrap_err();
        let good = tensor(4096, &[4, 8], &[8, 1], 2);
        assert!(refused(0, &[]).contains("got 0"));
        assert!(refused(3, core::slice::from_ref(&good)).contains("multiple of 3 blocks, got 4"));
        assert!(refused(4, &[tensor(0, &[4], &[1], 1)]).contains("got address 0x0"));
        assert!(refused(4, &[tensor(8, &[4], &[], 1)]).contains("strides []"));
        assert!(refused(4, &[tensor(8, &[4, 0], &[1, 1], 1)]).contains("shape [4, 0]"));
        assert!(refused(4, &[tensor(8, &[4, 2], &[0, 1], 1)]).contains("strides above 0, got [0, 1]"));
        assert!(refused(4, &[tensor(8, &[4, 2], &[2, -1], 1)]).contains("got [2, -1]"));
        assert!(refused(4, &[tensor(8, &[4, 2], &[1, 1], 1)]).contains("do not overlap"));
        assert!(refused(4, &[tensor(8, &[4, 2], &[i64::MAX, 1], 8)]).contains("below 2^63"));
        assert!(refused(4, &[tensor(8, &[4, u64::MAX], &[1, 1], 8)]).contains("below 2^63"));
        assert!(refused(2, &[tensor(8, &[2, 70_000], &[140_000, 2], 1)]).contains("at most 65536"));
        let many: Vec<_> = (0..3).map(|at| tensor(8 + (at << 20), &[2, 30_000], &[60_000, 2], 1)).collect();
        assert!(refused(2, &many).contains("at most 65536"));
        assert!(refused(4, &[good.clone(), good]).contains("tensors[1]"));
    }

    /// The bytes of each block, counted one by one; `None` where a byte has two owners.
    fn bytes_of_blocks(num_blocks: u64, tensors: &[Tensor]) -> Option<Vec<BTreeSet<u64>>> {
        let mut blocks = vec![BTreeSet::new(); num_blocks as usize];
        for tensor in tensors {
            let elements: u64 = tensor.shape.iter().product();
            for element in 0..elements {
                let (mut rest, mut at, mut first) = (element, tensor.address, 0);
                for (size, stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
                    first = rest % size;
                    at += first * *stride as u64 * tensor.itemsize;
                    rest /= size;
                }
                let block = first / (tensor.shape[0] / num_blocks);
                for byte in at..at + tensor.itemsize {
                    if !blocks[block as usize].insert(byte) {
                        return None;
                    }
                }
            }
        }
        let total: usize = blocks.iter().map(BTreeSet::len).sum();
        let all: BTreeSet<u64> = blocks.iter().flatten().copied().collect();
        (all.len() == total).then_some(blocks)
    }

    fn agree(num_blocks: u32, tensors: &[Tensor]) -> Result<(), TestCaseError> {
        let expected = bytes_of_blocks(num_blocks.into(), tensors);
        let found = match planes(num_blocks, tensors) {
            Ok((found, _)) => found,
            Err(text) => {
                // Pages of different strides are compared by their ranges alone.
                let from_block_to_block = |tensor: &Tensor| {
                    let kernel = tensor.shape[0] / u64::from(num_blocks);
                    tensor.strides[0] as u64 * tensor.itemsize * kernel
                };
                let strides: BTreeSet<u64> = tensors.iter().map(from_block_to_block).collect();
                prop_assert!(expected.is_none() || strides.len() > 1, "{}", text);
                return Ok(());
            }
        };
        prop_assert!(expected.is_some(), "{:?} overlap: {:?}", tensors, found);
        for (block, expected) in (0..).zip(expected.unwrap_or_default()) {
            let mut bytes = BTreeSet::new();
            for piece in &found {
                let start = piece.address + piece.stride * block;
                bytes.extend(start..start + piece.bytes);
            }
            prop_assert_eq!(bytes, expected, "block {}", block);
        }
        for two in found.windows(2).filter(|two| two[0].tensor == two[1].tensor) {
            prop_assert!(two[0].address + two[0].bytes < two[1].address, "{:?} is one piece", two);
        }
        Ok(())
    }

    /// Dimensions in any order in memory, with or without room between them; or any strides at all.
    fn tensors() -> impl Strategy<Value = (u32, Vec<Tensor>)> {
        let nested = (prop::collection::vec((1u64..4, 0i64..3, any::<u32>()), 1..4), 1u32..5, 1u64..3);
        let nested = nested.prop_map(|(inner, num_blocks, kernel)| {
            let mut dimensions = vec![(u64::from(num_blocks) * kernel, 0, inner[0].2 / 2)];
            dimensions.extend(inner);
            let mut order: Vec<usize> = (0..dimensions.len()).collect();
            order.sort_by_key(|at| dimensions[*at].2);
            let (mut strides, mut extent) = (vec![0; dimensions.len()], 1);
            for at in order {
                let (size, room, _) = dimensions[at];
                strides[at] = extent + room;
                extent = strides[at] * size as i64;
            }
            (num_blocks, dimensions.iter().map(|(size, ..)| *size).collect::<Vec<_>>(), strides)
        });
        let any = (1u32..5, 1u64..3, prop::collection::vec((1u64..4, 1i64..20), 1..4), 1i64..20);
        let any = any.prop_map(|(num_blocks, kernel, inner, stride)| {
            let (mut shape, mut strides) = (vec![u64::from(num_blocks) * kernel], vec![stride]);
            shape.extend(inner.iter().map(|(size, _)| *size));
            strides.extend(inner.iter().map(|(_, stride)| *stride));
            (num_blocks, shape, strides)
        });
        let places = prop_oneof![Just(vec![0]), prop::collection::vec(0u64..200, 1..4), Just(vec![0, 1000])];
        (prop_oneof![nested, any], 1u64..4, places).prop_map(
            |((num_blocks, shape, strides), itemsize, places)| {
                let at = |place| tensor(4096 + place, &shape, &strides, itemsize);
                (num_blocks, places.into_iter().map(at).collect())
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn planes_are_the_bytes_of_each_block_and_overlaps_are_found((num_blocks, tensors) in tensors()) {
            agree(num_blocks, &tensors)?;
        }

        #[test]
        fn tensors_of_different_shapes((num_blocks, mut one) in tensors(), (_, other) in tensors()) {
            one.extend(other.into_iter().map(|mut tensor| {
                tensor.shape[0] = num_blocks.into();
                tensor
            }));
            agree(num_blocks, &one)?;
        }
    }
}
