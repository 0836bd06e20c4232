//! Random numbers that are the same on every machine, and caches laid out in each of vLLM's page orders.

/// splitmix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    pub(crate) fn within(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    pub(crate) fn shuffle<T>(&mut self, all: &mut [T]) {
        for at in (1..all.len()).rev() {
            all.swap(at, self.within(0, at));
        }
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// A plane: the offset of its first page, the bytes from page to page, the bytes of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Laid {
    pub(crate) at: usize,
    pub(crate) stride: usize,
    pub(crate) page: usize,
}

/// How long each axis is, and the bytes of a token in one head and layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) layers: usize,
    pub(crate) blocks: usize,
    pub(crate) heads: usize,
    pub(crate) tokens: usize,
    pub(crate) content: usize,
    /// Gap between a block's bytes of a layer and the next block's.
    pub(crate) spare: usize,
}

/// The planes of a cache whose axes are in this order, the outermost first (`LBHN`: layers, blocks, heads, tokens), from `at` on,
/// and where the last one ends.
pub(crate) fn lay(axes: &str, sizes: Sizes, at: usize) -> (Vec<Laid>, usize) {
    let Sizes { layers, blocks, heads, tokens, content, spare } = sizes;
    let count = |axis: char| match axis {
        'L' => layers,
        'B' => blocks,
        'H' => heads,
        _ => tokens,
    };
    let stride = |axis: char| {
        let inner = axes.split_once(axis).map_or("", |(_, inner)| inner);
        let bytes = inner.chars().map(count).product::<usize>() * content;
        match axis {
            'L' => bytes + spare * blocks,
            'B' => bytes + spare,
            _ => bytes,
        }
    };
    let place = |axis: char| axes.find(axis).unwrap_or(axes.len());
    let by_head = heads > 1 && place('H') < place('B').max(place('L'));
    let (each, page) = if by_head { (heads, tokens * content) } else { (1, heads * tokens * content) };
    let mut planes = Vec::new();
    for layer in 0..layers {
        for head in 0..each {
            let at = at + layer * stride('L') + head * stride('H');
            planes.push(Laid { at, stride: stride('B'), page });
        }
    }
    (planes, at + layers * blocks * (heads * tokens * content + spare))
}

/// Planes with pages of several lengths that lie in each other's gaps, from `at` on, and where the last one ends.
pub(crate) fn lay_packed(pages: &[usize], blocks: usize, spare: usize, at: usize) -> (Vec<Laid>, usize) {
    let stride = pages.iter().sum::<usize>() + spare;
    let mut begin = at;
    let planes = pages.iter().map(|&page| {
        let laid = Laid { at: begin, stride, page };
        begin += page;
        laid
    });
    (planes.collect(), at + blocks * stride)
}
