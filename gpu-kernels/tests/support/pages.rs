//! Random groups of pages in each of vLLM's page orders, and a plain reference of which pages a chunk has: it knows only axes and
//! strides.

use super::random::Random;
use kvring_gpu_kernels::{KvGroup, Plane, SKIP};

/// vLLM's page orders: a name, and the axes from the outermost on, but for the content: Layers, Blocks, Heads, tokens (N).
pub(crate) const ORDERS: [(&str, &str); 9] = [
    ("LBHNC", "LBHN"),
    ("LBNHC", "LBNH"),
    ("LHBNC", "LHBN"),
    ("BLHNC", "BLHN"),
    ("BLNHC", "BLNH"),
    ("BHLNC", "BHLN"),
    ("MLA", "LBN"),
    // Pages of several lengths that lie in each other's gaps.
    ("packed", ""),
    // A block's bytes of a layer end before those of the next block begin.
    ("padded", "LBHN"),
];

/// Limits for random groups of pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Lengths and offsets of pages are multiples of this.
    pub(crate) unit: usize,
    /// The most units of a token's content.
    pub(crate) content: usize,
    /// The most tokens of a block.
    pub(crate) tokens: usize,
    /// The most layers, and the most heads.
    pub(crate) layers: usize,
    /// The fewest and the most blocks.
    pub(crate) blocks: (usize, usize),
    /// The fewest and the most blocks of a chunk.
    pub(crate) per_chunk: (usize, usize),
    /// The most groups.
    pub(crate) groups: usize,
    /// May all blocks be so far from block 0 that the distance has more than 32 bits? There is no memory between.
    pub(crate) far: bool,
}

impl Shape {
    pub(crate) const SMALL: Shape = Shape {
        unit: 16,
        content: 6,
        tokens: 16,
        layers: 3,
        blocks: (1, 9),
        per_chunk: (1, 6),
        groups: 3,
        far: false,
    };
}

/// A plane: the offset of its first page, the bytes from page to page, the bytes of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Laid {
    pub(crate) at: usize,
    pub(crate) stride: usize,
    pub(crate) page: usize,
}

/// The planes of a cache whose axes are in this order, from `at` on. `count` gives the length of each axis, and `spare` the bytes
/// between one block's bytes of a layer and the next block's.
fn lay(axes: &str, count: impl Fn(char) -> usize, content: usize, spare: usize, at: usize) -> Vec<Laid> {
    let stride = |axis: char| {
        let inner = axes.split_once(axis).map_or("", |(_, inner)| inner);
        let bytes = inner.chars().map(&count).product::<usize>() * content;
        match axis {
            'L' => bytes + spare * count('B'),
            'B' => bytes + spare,
            _ => bytes,
        }
    };
    let place = |axis: char| axes.find(axis).unwrap_or(axes.len());
    let by_head = count('H') > 1 && place('H') < place('B').max(place('L'));
    let (heads, page) = match by_head {
        true => (count('H'), count('N') * content),
        false => (1, count('H') * count('N') * content),
    };
    let planes = (0..count('L')).flat_map(|layer| (0..heads).map(move |head| (layer, head)));
    let at = |(layer, head): (usize, usize)| at + layer * stride('L') + head * stride('H');
    planes.map(|plane| Laid { at: at(plane), stride: stride('B'), page }).collect()
}

/// Layers that share a block table.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) order: &'static str,
    /// Their pages begin at `at + (block - lowest) × stride` of the memory.
    pub(crate) planes: Vec<Laid>,
    /// The lowest block id whose pages exist, and how many blocks do: as in a cache of a terabyte, ids may be high.
    pub(crate) lowest: u32,
    pub(crate) blocks: u32,
    pub(crate) per_chunk: u32,
}

impl Group {
    /// A group in the order of this index that is laid out from `at` on, and where it ends.
    pub(crate) fn new(rng: &mut Random, order: usize, shape: Shape, at: usize) -> (Group, usize) {
        let (name, axes) = ORDERS[order];
        let blocks = rng.within(shape.blocks.0, shape.blocks.1);
        let (layers, tokens) = (rng.within(1, shape.layers), rng.within(1, shape.tokens));
        let heads = if axes.contains('H') { rng.within(1, shape.layers) } else { 1 };
        let content = shape.unit * rng.within(1, shape.content);
        let mut planes;
        let end;
        if name == "packed" {
            let pages: Vec<usize> = (0..=layers).map(|_| content * rng.within(1, tokens)).collect();
            let stride = pages.iter().sum::<usize>() + shape.unit * rng.within(0, 5);
            let mut next = at;
            let laid = pages.iter().map(|&page| {
                next += page;
                Laid { at: next - page, stride, page }
            });
            planes = laid.collect::<Vec<_>>();
            end = at + blocks * stride;
        } else {
            let spare = if name == "padded" { shape.unit * rng.within(1, 5) } else { 0 };
            let count = |axis: char| match axis {
                'L' => layers,
                'B' => blocks,
                'H' => heads,
                _ => tokens,
            };
            planes = lay(axes, count, content, spare, at);
            end = at + layers * blocks * (heads * tokens * content + spare);
        }
        if rng.one_in(2) {
            planes.sort_by_key(|plane| plane.at);
        }
        let lowest = if shape.far && rng.one_in(3) { rng.within(1 << 29, 1 << 31) as u32 } else { 0 };
        let per_chunk = rng.within(shape.per_chunk.0, shape.per_chunk.1) as u32;
        (Group { order: name, planes, lowest, blocks: blocks as u32, per_chunk }, end)
    }

    /// The group as kvring knows it, in memory that begins at this address.
    pub(crate) fn described(&self, memory: u64) -> KvGroup {
        let planes = self.planes.iter().map(|laid| {
            let far = u64::from(self.lowest) * laid.stride as u64;
            let base = memory.wrapping_add(laid.at as u64).wrapping_sub(far);
            Plane { base: base as *mut u8, block_stride: laid.stride, page_bytes: laid.page }
        });
        KvGroup {
            planes: planes.collect(),
            num_blocks: self.lowest + self.blocks,
            blocks_per_chunk: self.per_chunk,
        }
    }

    /// So many blocks, some more than once, and SKIP where that is allowed.
    pub(crate) fn any(&self, rng: &mut Random, count: usize, skips: bool) -> Vec<u32> {
        let block = |rng: &mut Random| match rng.bits() % 4 {
            0 => self.lowest,
            1 => self.lowest + self.blocks - 1,
            2 if skips => SKIP,
            _ => self.lowest + rng.within(0, self.blocks as usize - 1) as u32,
        };
        (0..count).map(|_| block(rng)).collect()
    }

    /// So many blocks, each at most once, and SKIP. Every other time they stay contiguous.
    pub(crate) fn distinct(&self, rng: &mut Random, count: usize) -> Vec<u32> {
        let mut blocks: Vec<u32> = (self.lowest..self.lowest + self.blocks).collect();
        blocks.resize(blocks.len().max(count), SKIP);
        let some = rng.within(2, 6) as u64;
        blocks.iter_mut().for_each(|block| *block = if rng.one_in(some) { SKIP } else { *block });
        if rng.one_in(2) {
            rng.shuffle(&mut blocks);
        }
        blocks.truncate(count);
        blocks
    }
}

/// The block ids of so many chunks. `draw` gives those of one group for all chunks.
pub(crate) fn chunks(
    groups: &[Group],
    count: usize,
    mut draw: impl FnMut(&Group, usize) -> Vec<u32>,
) -> Vec<Vec<u32>> {
    let mut chunks = vec![Vec::new(); count];
    for group in groups {
        let per_chunk = group.per_chunk as usize;
        let ids = draw(group, per_chunk * count);
        chunks.iter_mut().zip(ids.chunks(per_chunk)).for_each(|(chunk, ids)| chunk.extend_from_slice(ids));
    }
    chunks
}

/// One page of a chunk: its offset in the shard, and in the memory if its block is not skipped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) position: usize,
    pub(crate) offset: usize,
    pub(crate) at: Option<usize>,
    pub(crate) bytes: usize,
}

/// The pages of a chunk of these blocks, in the order of the shard.
pub(crate) fn pieces(groups: &[Group], chunk: &[u32]) -> Vec<Piece> {
    let (mut pieces, mut offset) = (Vec::new(), 0);
    let groups = groups.iter().flat_map(|group| (0..group.per_chunk).map(move |_| group));
    for (position, (group, &block)) in groups.zip(chunk).enumerate() {
        for laid in &group.planes {
            let at = (block != SKIP).then(|| laid.at + (block - group.lowest) as usize * laid.stride);
            pieces.push(Piece { position, offset, at, bytes: laid.page });
            offset += laid.page;
        }
    }
    pieces
}
